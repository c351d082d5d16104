#include "images.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <string_view>
#include <unordered_map>

#include "error.h"

namespace fs = std::filesystem;

namespace {

// The endings, in any case, that preprocess.py writes labels for.
constexpr std::array<std::string_view, 5> kEndings = {".jpg", ".jpeg", ".png", ".bmp", ".webp"};

// Hidden files, such as the ._x.jpg that macOS writes beside x.jpg, are none.
bool IsImage(const fs::path& path) {
  if (path.filename().string().front() == '.') return false;
  std::string ending = path.extension().string();
  std::transform(ending.begin(), ending.end(), ending.begin(), [](unsigned char c) { return std::tolower(c); });
  return std::find(kEndings.begin(), kEndings.end(), ending) != kEndings.end();
}

std::vector<fs::path> List(const fs::path& folder) {
  std::vector<fs::path> entries;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) entries.push_back(entry.path());
  std::sort(entries.begin(), entries.end());
  return entries;
}

}  // namespace

fs::path ImageRoot(const fs::path& given) { return fs::is_directory(given / "val") ? given / "val" : given; }

std::vector<ImageFile> FindImages(const fs::path& given) try {
  const fs::path root = ImageRoot(given);
  if (!fs::is_directory(root)) throw Error("no folder " + root.string() + "; set --dataset_path to the images");
  std::vector<fs::path> flat, sorted;
  for (const fs::path& entry : List(root)) {
    if (!fs::is_directory(entry)) {
      if (IsImage(entry)) flat.push_back(entry);
    } else if (entry.filename().string().front() != '.') {
      for (const fs::path& inner : List(entry)) {
        if (!fs::is_directory(inner) && IsImage(inner)) sorted.push_back(inner);
      }
    }
  }
  std::vector<ImageFile> images;
  std::unordered_map<std::string, fs::path> known;
  for (const fs::path& path : sorted.empty() ? flat : sorted) {
    const auto [first, is_new] = known.emplace(path.stem().string(), path);
    if (!is_new) {
      throw Error(first->second.string() + " and " + path.string() + " would have one result file, " + first->first +
                  "_0.bin; rename one of them");
    }
    images.push_back({path, first->first});
  }
  if (images.empty()) {
    throw Error("no images (jpg, jpeg, png, bmp, webp) in " + root.string() +
                " or in folders in it; set --dataset_path to the images");
  }
  return images;
} catch (const fs::filesystem_error& error) {
  throw Error("cannot read " + error.path1().string() + ": " + error.code().message() + "; change its permissions");
}
