#pragma once

#include <filesystem>
#include <string>
#include <vector>

struct ImageFile {
  std::filesystem::path path;
  std::string name;  // without folder and ending: what the result file is named after
};

// The folder of the images that `given` means: `given`/val if there is such a folder, else `given`.
std::filesystem::path ImageRoot(const std::filesystem::path& given);

// The images in `ImageRoot(given)`, hidden files apart: those of the class folders, or, if no class folder holds one,
// those of the folder itself. In a fixed order.
//
// Throws Error if there are none, if a folder cannot be read, or if two images would have one result file.
std::vector<ImageFile> FindImages(const std::filesystem::path& given);
