#pragma once

#include <string>

#include "resample.h"

// The command line. Empty paths have not been given.
struct Options {
  std::string model_path;
  std::string dataset_path;
  std::string device_target = "Ascend";
  int device_id = 0;
  int resize = 256;
  int crop = 224;
  Filter interpolation = Filter::kBilinear;
  int batch_size = 1;
  int num_threads;
  int model_threads = 0;
  std::string output_dir = ".";
  bool resume = false;
  bool help = false;

  Options();
};

// Throws Error for an unknown flag, a bad value, or a path that is missing.
Options ParseOptions(int argc, const char* const* argv);

// What --help prints.
std::string Help();
