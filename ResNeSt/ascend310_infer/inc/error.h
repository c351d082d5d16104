#pragma once

#include <stdexcept>

// Something the user can put right: one line that says what is wrong and what to do. Ends the program with status 2.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
