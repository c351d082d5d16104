#pragma once

#include <ext/stdio_filebuf.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <ostream>
#include <system_error>
#include <utility>

#include "options.h"

inline std::filesystem::path LibraryLogPath(const Options& options) {
  return std::filesystem::path(options.output_dir) / "libraries.log";
}

// The program's own stderr, where nobody else writes.
inline std::ostream& Messages() {
  static __gnu_cxx::stdio_filebuf<char> buffer(dup(STDERR_FILENO), std::ios::out);
  static std::ostream stream(&buffer);
  return stream;
}

// While it lives, what libraries write to stderr goes to a file: Lite reports a bad model on pages, and libjpeg, libpng
// and OpenCV know no image's name. If it is empty in the end it is removed.
class LibraryLog {
 public:
  explicit LibraryLog(std::filesystem::path path) : path_(std::move(path)), stderr_(dup(STDERR_FILENO)) {
    Messages();  // before it would be the file
    const int file = open(path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0666);
    dup2(file, STDERR_FILENO);
    close(file);
  }
  LibraryLog(const LibraryLog&) = delete;
  LibraryLog& operator=(const LibraryLog&) = delete;
  ~LibraryLog() {
    const bool is_empty = IsEmpty();
    dup2(stderr_, STDERR_FILENO);
    close(stderr_);
    std::error_code ignored;
    if (is_empty) std::filesystem::remove(path_, ignored);
  }

  // Forget what has been written.
  void Clear() const {
    std::error_code ignored;  // then there is more in it than need be
    std::fflush(stderr);
    std::filesystem::resize_file(path_, 0, ignored);
  }

  bool IsEmpty() const {
    std::error_code error;
    std::fflush(stderr);
    return std::filesystem::file_size(path_, error) == 0 && !error;
  }

 private:
  const std::filesystem::path path_;
  const int stderr_;
};
