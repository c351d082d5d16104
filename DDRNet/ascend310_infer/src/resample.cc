#include "resample.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

// Weights are integers, 2^22 for 1: with 8 bits of a pixel and a sign, sums that overshoot still fit 32 bits.
constexpr int kFraction = 22;

// Distance in output pixels at which a filter becomes 0.
double Radius(Filter filter) { return filter == Filter::kBilinear ? 1 : 2; }

double Value(Filter filter, double x) {
  x = std::abs(x);
  if (x >= Radius(filter)) return 0;
  if (filter == Filter::kBilinear) return 1 - x;
  constexpr double a = -0.5;  // Keys, "Cubic convolution interpolation for digital image processing", equation 4
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return (((x - 5) * x + 8) * x - 4) * a;
}

// What an output pixel is the sum of: input pixels from `first` on, each times its weight.
struct Taps {
  int first;
  std::vector<int32_t> weights;

  int end() const { return first + static_cast<int>(weights.size()); }
};

// The taps of the output pixels `first`, …, `first + count - 1` when `length` pixels become `side`.
std::vector<Taps> MakeTaps(int length, int side, int first, int count, Filter filter) {
  const double scale = static_cast<double>(length) / side;
  const double stretch = std::max(scale, 1.0);
  const double radius = Radius(filter) * stretch;
  std::vector<Taps> all;
  for (int out = first; out < first + count; ++out) {
    const double centre = (out + 0.5) * scale;
    const int begin = std::max(static_cast<int>(centre - radius + 0.5), 0);
    const int end = std::min(static_cast<int>(centre + radius + 0.5), length);
    std::vector<double> values;
    double sum = 0;
    for (int in = begin; in < end; ++in) {
      values.push_back(Value(filter, (in - centre + 0.5) * (1 / stretch)));
      sum += values.back();
    }
    Taps taps{begin, {}};
    for (const double value : values) {
      taps.weights.push_back(static_cast<int32_t>(std::round(value / sum * (1 << kFraction))));
    }
    all.push_back(std::move(taps));
  }
  return all;
}

constexpr int32_t kHalf = 1 << (kFraction - 1);

uint8_t Byte(int32_t sum) { return static_cast<uint8_t>(std::clamp(sum >> kFraction, 0, 255)); }

// Filters every row.
cv::Mat Across(const cv::Mat& image, const std::vector<Taps>& all) {
  cv::Mat result(image.rows, static_cast<int>(all.size()), CV_8UC3);
  for (int y = 0; y < image.rows; ++y) {
    uint8_t* out = result.ptr<uint8_t>(y);
    for (const Taps& taps : all) {
      const uint8_t* in = image.ptr<uint8_t>(y) + 3 * taps.first;
      int32_t sums[3] = {kHalf, kHalf, kHalf};
      for (const int32_t weight : taps.weights) {
        for (int32_t& sum : sums) sum += weight * *in++;
      }
      for (const int32_t sum : sums) *out++ = Byte(sum);
    }
  }
  return result;
}

// Filters every column.
cv::Mat Down(const cv::Mat& image, const std::vector<Taps>& all) {
  cv::Mat result(static_cast<int>(all.size()), image.cols, CV_8UC3);
  std::vector<int32_t> sums(3 * static_cast<size_t>(image.cols));
  for (int y = 0; y < result.rows; ++y) {
    std::fill(sums.begin(), sums.end(), kHalf);
    int row = all[y].first;
    for (const int32_t weight : all[y].weights) {
      const uint8_t* in = image.ptr<uint8_t>(row++);
      for (size_t x = 0; x < sums.size(); ++x) sums[x] += weight * in[x];
    }
    std::transform(sums.begin(), sums.end(), result.ptr<uint8_t>(y), Byte);
  }
  return result;
}

// The input pixels that all these taps need. Afterwards they count from the first of those.
cv::Range Needed(std::vector<Taps>& all) {
  const cv::Range range(all.front().first, all.back().end());
  for (Taps& taps : all) taps.first -= range.start;
  return range;
}

}  // namespace

cv::Mat Resample(const cv::Mat& image, int side, int first, int count, Filter filter) {
  CV_Assert(image.type() == CV_8UC3 && count > 0);
  std::vector<Taps> across = MakeTaps(image.cols, side, first, count, filter);
  std::vector<Taps> down = MakeTaps(image.rows, side, first, count, filter);
  const cv::Range columns = Needed(across), rows = Needed(down);
  const cv::Mat part = image(rows, columns);
  // Bytes in between are rounded and clipped, so the order counts. This is Pillow 13's; older ones begin with the rows.
  const bool columns_first = image.rows > side && image.rows - side > 2 * (image.cols - side);
  return columns_first ? Across(Down(part, down), across) : Down(Across(part, across), down);
}
