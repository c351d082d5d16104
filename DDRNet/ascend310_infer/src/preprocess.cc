#include "preprocess.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <new>
#include <opencv2/imgcodecs.hpp>
#include <string_view>

namespace {

using Bytes = std::vector<uint8_t>;

// As Pillow, which takes larger ones for an attack.
constexpr uint64_t kMostPixels = 2 * (uint64_t{1024} * 1024 * 1024 / 4 / 3);

// What each level of each channel becomes.
using Levels = std::array<std::array<float, 256>, 3>;

Levels MakeLevels() {
  constexpr double kMean[] = {0.485, 0.456, 0.406}, kStd[] = {0.229, 0.224, 0.225};
  Levels levels;
  for (int c = 0; c < 3; ++c) {
    for (int level = 0; level < 256; ++level) {
      levels[c][level] = static_cast<float>((level / 255.0 - kMean[c]) / kStd[c]);
    }
  }
  return levels;
}

bool StartsWith(const Bytes& content, std::string_view start) {
  return content.size() >= start.size() && std::memcmp(content.data(), start.data(), start.size()) == 0;
}

// What the walk through a file's segments or chunks finds, so far as can be told before decoding.
struct Outline {
  bool whole = false;
  uint64_t pixels = 0;
};

// The number in `count` bytes from `at` on, or what there is of them.
uint64_t BigEndian(const Bytes& content, size_t at, size_t count) {
  uint64_t number = 0;
  for (const size_t end = std::min(at + count, content.size()); at < end; ++at) number = 256 * number + content[at];
  return number;
}

// A JPEG is whole if it has its end marker. OpenCV decodes what there is of a truncated one and paints the rest grey.
Outline WalkJpeg(const Bytes& content) {
  Outline outline;
  size_t at = 2;
  while (at + 1 < content.size()) {
    if (content[at] != 0xFF || content[at + 1] == 0xFF) {  // coded data, or a fill byte
      ++at;
      continue;
    }
    const uint8_t marker = content[at + 1];
    at += 2;
    if (marker == 0xD9) {
      outline.whole = true;
      return outline;
    }
    if (marker <= 0x01 || (marker >= 0xD0 && marker <= 0xD8)) continue;  // markers without a segment
    if (at + 1 >= content.size()) return outline;
    if (marker >= 0xC0 && marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC) {  // start of frame
      outline.pixels = std::max(outline.pixels, BigEndian(content, at + 3, 2) * BigEndian(content, at + 5, 2));
    }
    at += BigEndian(content, at, 2);
  }
  return outline;
}

// A PNG is whole if it has its last chunk. libpng would find that out too, but with lines of its own on stderr.
Outline WalkPng(const Bytes& content) {
  Outline outline;
  size_t at = 8;
  while (at + 12 <= content.size() && !outline.whole) {
    if (std::memcmp(&content[at + 4], "IHDR", 4) == 0) {
      outline.pixels = BigEndian(content, at + 8, 4) * BigEndian(content, at + 12, 4);
    }
    outline.whole = std::memcmp(&content[at + 4], "IEND", 4) == 0;
    at += 12 + BigEndian(content, at, 4);
  }
  return outline;
}

Outline Walk(const Bytes& content) {
  if (StartsWith(content, "\xFF\xD8")) return WalkJpeg(content);
  if (StartsWith(content, "\x89PNG")) return WalkPng(content);
  return {true, 0};  // not known before decoding
}

// PNG with one channel of 16 bits: its header's bit depth and colour type.
bool IsGrey16(const Bytes& content) {
  return StartsWith(content, "\x89PNG") && content.size() > 25 && content[24] == 16 && content[25] == 0;
}

// Pillow does not rotate, whatever EXIF says.
constexpr int kAsStored = cv::IMREAD_IGNORE_ORIENTATION;

// BGR; empty if it cannot be decoded.
cv::Mat Decode(const Bytes& content) {
  if (IsGrey16(content)) {
    // OpenCV would take the upper byte. Pillow clips at 255.
    const cv::Mat grey = cv::imdecode(content, kAsStored | cv::IMREAD_GRAYSCALE | cv::IMREAD_ANYDEPTH);
    cv::Mat clipped, image;
    if (grey.empty()) return image;
    grey.convertTo(clipped, CV_8U);
    cv::merge(std::vector<cv::Mat>(3, clipped), image);
    return image;
  }
  return cv::imdecode(content, kAsStored | cv::IMREAD_COLOR);
}

}  // namespace

Prepared Preprocess::operator()(const std::filesystem::path& path) const try {
  static const Levels levels = MakeLevels();
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) return {{}, "cannot be opened"};
  const std::streamoff size = file.tellg();
  if (size == 0) return {{}, "is empty"};
  Bytes content(static_cast<size_t>(std::max<std::streamoff>(size, 0)));
  file.seekg(0).read(reinterpret_cast<char*>(content.data()), size);
  if (!file) return {{}, "cannot be read"};
  const Outline outline = Walk(content);
  if (!outline.whole) return {{}, "is truncated"};
  if (outline.pixels > kMostPixels) return {{}, "has too many pixels"};
  const cv::Mat image = Decode(content);
  if (image.empty()) return {{}, "cannot be read as an image"};
  if (image.total() > kMostPixels) return {{}, "has too many pixels"};

  const int edge = static_cast<int>(std::nearbyint((resize_ - crop_) / 2.0));  // half to even, as Python's round
  const cv::Mat square = Resample(image, resize_, edge, crop_, filter_);
  const size_t plane = square.total();
  std::vector<float> tensor(3 * plane);
  const uint8_t* bgr = square.ptr<uint8_t>();
  for (size_t k = 0; k < plane; ++k, bgr += 3) {
    for (size_t c = 0; c < 3; ++c) tensor[c * plane + k] = levels[c][bgr[2 - c]];
  }
  return {std::move(tensor), ""};
} catch (const cv::Exception&) {
  return {{}, "cannot be read as an image"};
} catch (const std::bad_alloc&) {
  return {{}, "does not fit into memory"};
}
