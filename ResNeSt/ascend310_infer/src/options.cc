#include "options.h"

#include <algorithm>
#include <charconv>
#include <string_view>
#include <thread>

#include "error.h"

namespace {

int Number(const std::string& flag, const std::string& text, int least, int most) {
  int value = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end || value < least || value > most) {
    throw Error(flag + " is " + (text.empty() ? "empty" : text) + "; give a whole number from " +
                std::to_string(least) + " to " + std::to_string(most));
  }
  return value;
}

int Cores() { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); }

}  // namespace

Options::Options() : num_threads(Cores()) {}

Options ParseOptions(int argc, const char* const* argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    std::string flag = argv[i];
    if (flag == "--help") {
      options.help = true;
      return options;
    }
    if (flag == "--resume") {
      options.resume = true;
      continue;
    }
    std::string value;
    const size_t equals = flag.find('=');
    if (equals != std::string::npos) {
      value = flag.substr(equals + 1);
      flag.resize(equals);
    } else if (i + 1 < argc && std::string_view(argv[i + 1]).substr(0, 2) != "--") {  // else the next flag
      value = argv[++i];
    } else {
      throw Error(flag + " has no value, or is no flag of this program; see --help");
    }

    if (flag == "--model_path") {
      options.model_path = value;
    } else if (flag == "--dataset_path") {
      options.dataset_path = value;
    } else if (flag == "--device_target") {
      if (value != "Ascend" && value != "CPU") throw Error("--device_target is " + value + "; choose Ascend or CPU");
      options.device_target = value;
    } else if (flag == "--device_id") {
      options.device_id = Number(flag, value, 0, 4095);
    } else if (flag == "--resize") {
      options.resize = Number(flag, value, 1, 8192);
    } else if (flag == "--crop") {
      options.crop = Number(flag, value, 1, 8192);
    } else if (flag == "--interpolation") {
      if (value != "bilinear" && value != "bicubic") {
        throw Error("--interpolation is " + value + "; choose bilinear or bicubic");
      }
      options.interpolation = value == "bilinear" ? Filter::kBilinear : Filter::kBicubic;
    } else if (flag == "--batch_size") {
      options.batch_size = Number(flag, value, 1, 4096);
    } else if (flag == "--num_threads") {
      options.num_threads = Number(flag, value, 0, 16 * Cores());
    } else if (flag == "--model_threads") {
      options.model_threads = Number(flag, value, 0, 16 * Cores());
    } else if (flag == "--output_dir") {
      options.output_dir = value;
    } else {
      throw Error(flag + " is no flag of this program; see --help");
    }
  }
  if (options.model_path.empty()) throw Error("no model; set --model_path to a MINDIR file, which export.py makes");
  if (options.dataset_path.empty()) throw Error("no images; set --dataset_path to a folder of them");
  if (options.output_dir.empty()) throw Error("--output_dir is empty; give a folder, . for this one");
  if (options.crop > options.resize) {
    throw Error("--crop " + std::to_string(options.crop) + " is larger than --resize " +
                std::to_string(options.resize) + "; the crop is cut out of the resized image");
  }
  return options;
}

std::string Help() {
  return "usage: main --model_path FILE --dataset_path FOLDER [flags]\n"
         "Logits of a MINDIR classifier for every image of a folder, with MindSpore Lite.\n"
         "  --model_path FILE       MINDIR file; input float32 (batch_size, 3, crop, crop)\n"
         "  --dataset_path FOLDER   images, or class folders of images, or a root with val/\n"
         "  --device_target NAME    Ascend or CPU (default: Ascend)\n"
         "  --device_id N           number of the Ascend device (default: 0)\n"
         "  --resize N              side in pixels of the square that images are resized to (default: 256)\n"
         "  --crop N                side in pixels of its centre, which the model sees (default: 224)\n"
         "  --interpolation NAME    bilinear or bicubic, antialiased as in Pillow (default: bilinear)\n"
         "  --batch_size N          images in a call of the model (default: 1)\n"
         "  --num_threads N         decoding threads; 0 decodes and infers by turns (default: one per core, " +
         std::to_string(Cores()) +
         ")\n"
         "  --model_threads N       threads of the model on the CPU; 0 leaves it to MindSpore Lite (default: 0)\n"
         "  --output_dir FOLDER     gets result_Files/ and time_Result/ (default: .)\n"
         "  --resume                keep the results of an interrupted run and compute what is missing\n"
         "Exit status: 0; 2 cannot run; 3 done, but images were skipped; 130 interrupted.\n";
}
