#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "options.h"

// The folders result_Files and time_Result of a run. Files get their names when they are whole.
class Results {
 public:
  // Makes the folders. Throws Error if they cannot be written.
  explicit Results(const Options& options);

  // To be called before the first `Write`: without --resume, removes what is left of an earlier run and returns how many
  // results that were. With it, throws Error if they are of another model, device target or data set, or of images
  // prepared otherwise. In both cases, removes what writing left that was killed.
  size_t Begin();

  // Whether the image's `classes` logits are there already.
  bool Has(const std::string& name, size_t classes) const;

  void Write(const std::string& name, const float* logits, size_t classes);

  // time_Result/test_perform_static.txt. `batch_ms`: milliseconds of each call of the model; not empty.
  void WriteTimes(size_t images, size_t skipped, std::vector<double> batch_ms, double images_per_s);

  const std::filesystem::path& folder() const { return results_; }

 private:
  std::filesystem::path File(const std::string& name) const;

  const Options options_;
  const std::filesystem::path results_, times_;
};
