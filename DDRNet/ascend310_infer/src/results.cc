#include "results.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <numeric>
#include <sstream>
#include <string_view>

#include "error.h"
#include "images.h"

namespace fs = std::filesystem;

namespace {

constexpr std::string_view kEnding = "_0.bin";
constexpr std::string_view kPart = ".part";
constexpr const char* kSettings = ".settings";
constexpr const char* kTimes = "test_perform_static.txt";

[[noreturn]] void CannotWrite(const fs::path& path, const std::string& reason) {
  throw Error("cannot write " + path.string() + ": " + reason + "; make room or set --output_dir to another place");
}

// Writes a file under a temporary name and renames it, so that a file with its own name is whole.
void WriteWhole(const fs::path& path, const std::string& content) {
  const fs::path temporary = path.parent_path() / ("." + std::to_string(getpid()) + std::string(kPart));
  errno = 0;
  std::ofstream file(temporary, std::ios::binary);
  file << content;
  file.close();
  std::error_code error(errno, std::generic_category());
  if (file) {
    fs::rename(temporary, path, error);
    if (!error) return;
  }
  std::error_code ignored;  // the first one is told
  fs::remove(temporary, ignored);
  CannotWrite(path, error.message());
}

std::string ReadText(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// All that the logits depend on besides the content of the images.
std::string Settings(const Options& options) {
  struct stat model {};
  if (stat(options.model_path.c_str(), &model) != 0) {
    throw Error("cannot read " + options.model_path + ": " + std::strerror(errno));
  }
  std::ostringstream text;
  text << "MindSpore Lite on " << options.device_target << ", images of "
       << fs::canonical(ImageRoot(options.dataset_path)).string() << ", model of " << model.st_size
       << " bytes and time " << model.st_mtim.tv_sec << '.' << model.st_mtim.tv_nsec << ", resize " << options.resize
       << ", crop " << options.crop << ", " << (options.interpolation == Filter::kBilinear ? "bilinear" : "bicubic");
  return text.str();
}

bool EndsWith(std::string_view name, std::string_view ending) {
  return name.size() >= ending.size() && name.substr(name.size() - ending.size()) == ending;
}

bool IsResult(const fs::directory_entry& entry) {
  return EndsWith(entry.path().filename().string(), kEnding);
}

// Whether this is the temporary file of a `WriteWhole` that was killed.
bool IsPart(const fs::directory_entry& entry) {
  const std::string name = entry.path().filename().string();
  return name.front() == '.' && EndsWith(name, kPart) && name.size() > 1 + kPart.size() &&
         name.find_first_not_of("0123456789", 1) == name.size() - kPart.size();
}

}  // namespace

Results::Results(const Options& options)
    : options_(options),
      results_(fs::path(options.output_dir) / "result_Files"),
      times_(fs::path(options.output_dir) / "time_Result") {
  for (const fs::path& folder : {results_, times_}) {
    std::error_code error;
    fs::create_directories(folder, error);
    if (error) CannotWrite(folder, error.message());
    const fs::path probe = folder / ".writable";
    WriteWhole(probe, "");
    fs::remove(probe, error);
  }
}

size_t Results::Begin() try {
  const std::string settings = Settings(options_);
  std::vector<fs::path> old, parts;
  for (const fs::path& folder : {results_, times_}) {
    for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
      if (IsPart(entry)) parts.push_back(entry.path());
      if (folder == results_ && IsResult(entry)) old.push_back(entry.path());
    }
  }
  if (options_.resume) {
    const std::string before = ReadText(results_ / kSettings);
    if (!old.empty() && before != settings) {
      throw Error(results_.string() + " is of another run (" + (before.empty() ? "unknown" : before) + ", now " +
                  settings + "); leave out --resume or set --output_dir to another place");
    }
  } else {
    for (const fs::path& path : old) fs::remove(path);
    fs::remove(times_ / kTimes);
  }
  for (const fs::path& path : parts) fs::remove(path);
  WriteWhole(results_ / kSettings, settings);
  return options_.resume ? 0 : old.size();
} catch (const fs::filesystem_error& error) {
  CannotWrite(error.path1(), error.code().message());
}

fs::path Results::File(const std::string& name) const { return results_ / (name + std::string(kEnding)); }

bool Results::Has(const std::string& name, size_t classes) const {
  std::error_code error;
  return fs::file_size(File(name), error) == classes * sizeof(float) && !error;
}

void Results::Write(const std::string& name, const float* logits, size_t classes) {
  WriteWhole(File(name), std::string(reinterpret_cast<const char*>(logits), classes * sizeof(float)));
}

void Results::WriteTimes(size_t images, size_t skipped, std::vector<double> batch_ms, double images_per_s) {
  std::sort(batch_ms.begin(), batch_ms.end());
  const double mean = std::accumulate(batch_ms.begin(), batch_ms.end(), 0.0) / batch_ms.size();
  const auto percentile = [&](size_t percent) { return batch_ms[(batch_ms.size() - 1) * percent / 100]; };
  std::ostringstream text;
  text << "images: " << images << "\nskipped: " << skipped << "\nbatch_size: " << options_.batch_size
       << "\ninference of a batch, mean ms: " << mean << "\ninference of a batch, p50 ms: " << percentile(50)
       << "\ninference of a batch, p99 ms: " << percentile(99) << "\nimages/s end to end: " << images_per_s << '\n';
  WriteWhole(times_ / kTimes, text.str());
}
