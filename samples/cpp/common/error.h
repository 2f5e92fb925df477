// What a user did wrong, in one line: the value got, the values allowed, the option to change. Programs exit with status 2.
#pragma once

#include <stdexcept>

namespace attnspan {

struct UserError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace attnspan
