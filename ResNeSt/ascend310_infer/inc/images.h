#pragma once

#include <filesystem>
#include <string>
#include <vector>

struct ImageFile {
  std::filesystem::path path;
  std::string name;  // without folder and ending: what the result file is named after
};

// The images in `root`/val if there is such a folder, else in `root`: those of the class folders, or, if no class folder
// holds one, those of the folder itself. In a fixed order.
//
// Throws Error if there are none, if a folder cannot be read, or if two images would have one result file.
std::vector<ImageFile> FindImages(const std::filesystem::path& root);
