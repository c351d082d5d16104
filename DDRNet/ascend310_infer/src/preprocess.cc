#include "preprocess.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>
#include <opencv2/imgcodecs.hpp>
#include <string_view>
#include <system_error>

namespace {

using Bytes = std::vector<uint8_t>;

// As Pillow, which takes larger ones for an attack; and the longest side of a JPEG, for which resizing takes memory.
constexpr uint64_t kMostPixels = 2 * (uint64_t{1024} * 1024 * 1024 / 4 / 3), kLongestSide = 65535;

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
  bool known = true, whole = false;
  uint64_t width = 0, height = 0;
};

// The number in `count` bytes from `at` on, or what there is of them.
uint64_t BigEndian(const Bytes& content, size_t at, size_t count) {
  uint64_t number = 0;
  for (const size_t end = std::min(at + count, content.size()); at < end; ++at) number = 256 * number + content[at];
  return number;
}

uint64_t LittleEndian(const Bytes& content, size_t at, size_t count) {
  uint64_t number = 0;
  while (count--) number = 256 * number + BigEndian(content, at + count, 1);
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
      outline.height = std::max(outline.height, BigEndian(content, at + 3, 2));
      outline.width = std::max(outline.width, BigEndian(content, at + 5, 2));
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
      outline.width = BigEndian(content, at + 8, 4);
      outline.height = BigEndian(content, at + 12, 4);
    }
    outline.whole = std::memcmp(&content[at + 4], "IEND", 4) == 0;
    at += 12 + BigEndian(content, at, 4);
  }
  return outline;
}

// The sides in a BMP's header, of which the height is negative if the upper row comes first.
Outline ReadBmp(const Bytes& content) {
  const bool old = LittleEndian(content, 14, 4) == 12;
  const auto side = [&](size_t number) {
    if (old) return LittleEndian(content, 18 + 2 * number, 2);
    return static_cast<uint64_t>(std::abs(int64_t{static_cast<int32_t>(LittleEndian(content, 18 + 4 * number, 4))}));
  };
  return {true, content.size() > 26, side(0), side(1)};
}

// The formats that the Python programs read. A WebP has sides of 14 bits each, and its decoder tells whether it is whole.
Outline Walk(const Bytes& content) {
  if (StartsWith(content, "\xFF\xD8\xFF")) return WalkJpeg(content);
  if (StartsWith(content, "\x89PNG\r\n\x1A\n")) return WalkPng(content);
  if (StartsWith(content, "BM")) return ReadBmp(content);
  const bool webp = StartsWith(content, "RIFF") && content.size() > 12 && std::memcmp(&content[8], "WEBP", 4) == 0;
  return {webp, true, 0, 0};
}

// Pillow does not rotate, whatever EXIF says.
constexpr int kAsStored = cv::IMREAD_IGNORE_ORIENTATION;

// BGR; empty if it cannot be decoded. Of levels of 16 bits it is the upper byte, as in the Python programs.
cv::Mat Decode(const Bytes& content) { return cv::imdecode(content, kAsStored | cv::IMREAD_COLOR); }

}  // namespace

Prepared Preprocess::operator()(const std::filesystem::path& path) const try {
  static const Levels levels = MakeLevels();
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(path, error);
  if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) return {{}, "is no regular file"};
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) return {{}, "cannot be opened"};
  const std::streamoff size = file.tellg();
  if (size == 0) return {{}, "is empty"};
  Bytes content(static_cast<size_t>(std::max<std::streamoff>(size, 0)));
  file.seekg(0).read(reinterpret_cast<char*>(content.data()), size);
  if (!file) return {{}, "cannot be read"};
  const Outline outline = Walk(content);
  if (!outline.known) return {{}, "cannot be read as an image"};
  if (!outline.whole) return {{}, "is truncated"};
  if (outline.width * outline.height > kMostPixels || std::max(outline.width, outline.height) > kLongestSide) {
    return {{}, "has too many pixels"};
  }
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
