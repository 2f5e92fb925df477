// A node of the plugin's ops, checked against the table in plugin_schema.h, by the rules and in the words of schema.py. No TensorRT,
// no CUDA.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "plugin_schema.h"

namespace attnspan {

// What the library refuses or fails at: what was got, and what is allowed.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The value of an attribute: `ints` of kind int (one) and ints, `number` of kind float.
struct Value {
  std::vector<int32_t> ints;
  float number = 0.f;
};
using Attributes = std::map<std::string, Value, std::less<>>;
using Sizes = std::map<std::string, int64_t, std::less<>>;
using Shape = std::vector<int64_t>;

// An attribute as a caller gives it: `values` are whole numbers unless `is_float`.
struct Given {
  std::string name;
  std::vector<double> values;
  bool is_float = false;
};

// As Python writes a float: 1.0, -0.5, inf.
std::string number(double value);

// The symbols of each axis of a port: "[batch, num_heads * dim]" is {{"batch"}, {"num_heads", "dim"}}.
std::vector<std::vector<std::string>> axes_of(const schema::Port& port);

// All attributes: those given, and the defaults of the others. Error for what is not allowed.
Attributes attributes_of(const schema::Op& op, const std::vector<Given>& given);

// Error unless input `at` of `count` may have type types[at], given those before it. Types are NumPy's names ("float16").
void check_input_type(const schema::Op& op, size_t count, const std::vector<std::string>& types, size_t at);

// Types of the outputs. Error for a number of inputs or types that are not allowed.
std::vector<std::string> types_of(const schema::Op& op, const std::vector<std::string>& inputs);

// Size of each symbol, from the attributes and the inputs' shapes, in which -1 is not known yet. Error for a shape that does not
// fit.
Sizes sizes_of(const schema::Op& op, const Attributes& attributes, const std::vector<Shape>& shapes);

// "SpanAttention num_heads=8 kv_num_heads=2 ...": what distinguishes a node from others of its op.
std::string describe(const schema::Op& op, const Attributes& attributes);

}  // namespace attnspan
