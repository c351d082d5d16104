#pragma once

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <iostream>
#include <string>

#include "library_log.h"

// Images done and images/s: one line that is rewritten on a terminal, elsewhere a line every ten seconds.
class Progress {
 public:
  explicit Progress(size_t total) : total_(total), terminal_(isatty(STDOUT_FILENO) == 1) {}

  void Add(bool skipped) {
    ++done_;
    skipped_ += skipped ? 1 : 0;
    const auto now = Clock::now();
    if (now - shown_ >= std::chrono::milliseconds(terminal_ ? 200 : 10000)) {
      shown_ = now;
      std::cout << (terminal_ ? "\r\033[K" : "") << Line() << (terminal_ ? "" : "\n") << std::flush;
    }
  }

  // A line beside the progress.
  void Warn(const std::string& line) const {
    if (terminal_) std::cout << "\r\033[K" << std::flush;
    Messages() << "warning: " << line << std::endl;
  }

  void Finish() const { std::cout << (terminal_ ? "\r\033[K" : "") << Line() << std::endl; }

  size_t computed() const { return done_ - skipped_; }
  size_t skipped() const { return skipped_; }

  double images_per_s() const {
    const std::chrono::duration<double> seconds = Clock::now() - start_;
    return static_cast<double>(computed()) / seconds.count();
  }

 private:
  using Clock = std::chrono::steady_clock;

  std::string Line() const {
    char rate[32];
    std::snprintf(rate, sizeof rate, "%.1f", images_per_s());
    return std::to_string(done_) + " of " + std::to_string(total_) + " images, " + std::to_string(skipped_) +
           " skipped, " + rate + " images/s";
  }

  const size_t total_;
  const bool terminal_;
  const Clock::time_point start_ = Clock::now();
  Clock::time_point shown_ = start_;
  size_t done_ = 0, skipped_ = 0;
};
