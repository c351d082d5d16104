#include "classifier.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <utility>

#include "error.h"
#include "include/api/context.h"
#include "library_log.h"

namespace {

using mindspore::DataType;
using mindspore::MSTensor;
using Shape = std::vector<int64_t>;

std::string Text(const Shape& shape) {
  std::ostringstream text;
  for (size_t k = 0; k < shape.size(); ++k) text << (k ? "x" : "") << shape[k];
  return text.str();
}

std::string Reason(const mindspore::Status& status, const std::string& log) {
  const std::string text = status.ToString();
  return (text.empty() ? "no reason given" : text.substr(0, text.find_first_of("\r\n"))) + ", see " + log;
}

std::shared_ptr<mindspore::Context> MakeContext(const Options& options) {
  auto context = std::make_shared<mindspore::Context>();
  if (options.model_threads) context->SetThreadNum(options.model_threads);
  if (options.device_target == "Ascend") {
    auto device = std::make_shared<mindspore::AscendDeviceInfo>();
    device->SetDeviceID(static_cast<uint32_t>(options.device_id));
    context->MutableDeviceInfo().push_back(std::move(device));
  } else {
    context->MutableDeviceInfo().push_back(std::make_shared<mindspore::CPUDeviceInfo>());
  }
  return context;
}

}  // namespace

Classifier::Classifier(const Options& options) : batch_size_(options.batch_size), log_(LibraryLogPath(options)) {
  const std::string& path = options.model_path;
  if (!std::filesystem::is_regular_file(path)) throw Error("there is no model " + path + "; export.py makes one");
  if (!std::ifstream(path)) throw Error("cannot read " + path + "; change its permissions");

  mindspore::Status status = model_.Build(path, mindspore::kMindIR, MakeContext(options));
  inputs_ = model_.GetInputs();
  if (status.IsError()) {
    const bool ascend = options.device_target == "Ascend";
    throw Error("cannot load " + path + (ascend ? " on Ascend " + std::to_string(options.device_id) : "") + " (" +
                Reason(status, log_) + "): " + (ascend ? "there is no such device, or " : "") +
                "the file is damaged, no MINDIR file, or of a newer MindSpore; take the MindSpore Lite of the release "
                "that exported it" + (ascend ? ", or --device_target CPU" : ""));
  }
  const Shape wanted{options.batch_size, 3, options.crop, options.crop};
  if (inputs_.size() != 1) throw Error(path + " has " + std::to_string(inputs_.size()) + " inputs, not one of images");
  Shape found = inputs_.front().Shape();
  if (found.size() == 4 && found.front() == -1) {
    status = model_.Resize(inputs_, {wanted});
    if (status.IsError()) throw Error(path + " does not take " + Text(wanted) + ": " + Reason(status, log_));
    inputs_ = model_.GetInputs();
    found = inputs_.front().Shape();
  }
  if (found != wanted || inputs_.front().DataType() != DataType::kNumberTypeFloat32) {
    throw Error("the input of " + path + " is " + Text(found) +
                (inputs_.front().DataType() == DataType::kNumberTypeFloat32 ? "" : ", not of float32") +
                ", but --batch_size and --crop make it " + Text(wanted) + " of float32; set them as it was exported");
  }
  std::memset(Input(), 0, inputs_.front().DataSize());
  classes_ = Infer().size() / batch_size_;
}

float* Classifier::Input() { return static_cast<float*>(inputs_.front().MutableData()); }

const std::vector<float>& Classifier::Infer() {
  std::vector<MSTensor> outputs;
  const mindspore::Status status = model_.Predict(inputs_, &outputs);
  if (status.IsError()) throw Error("the device has failed: " + Reason(status, log_));
  if (outputs.size() != 1 || outputs.front().DataType() != DataType::kNumberTypeFloat32 ||
      outputs.front().Shape().size() != 2 || outputs.front().Shape().front() != static_cast<int64_t>(batch_size_)) {
    throw Error("the model's output is not float32 (batch size, classes); give the model of a classifier");
  }
  const auto* first = static_cast<const float*>(outputs.front().MutableData());
  logits_.assign(first, first + outputs.front().ElementNum());
  return logits_;
}
