// Writes what the inference program gives to its model for each image: tensors RESIZE CROP FILTER OUTPUT IMAGE...
// OUTPUT gets the tensors one after the other, float32 (3, CROP, CROP).

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>

#include "preprocess.h"

int main(int argc, char** argv) {
  const Filter filter = std::string(argv[3]) == "bicubic" ? Filter::kBicubic : Filter::kBilinear;
  const Preprocess preprocess(std::atoi(argv[1]), std::atoi(argv[2]), filter);
  std::ofstream output(argv[4], std::ios::binary);
  for (int i = 5; i < argc; ++i) {
    const Prepared image = preprocess(argv[i]);
    if (!image.problem.empty()) {
      std::cerr << argv[i] << ' ' << image.problem << '\n';
      return 1;
    }
    output.write(reinterpret_cast<const char*>(image.tensor.data()), image.tensor.size() * sizeof(float));
  }
  return output ? 0 : 1;
}
