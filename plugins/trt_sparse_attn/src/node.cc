#include "node.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace attnspan {
namespace {

constexpr char kFp8[] = "float8_e4m3fn";

template <class Items, class Text>
std::string join(const Items& items, const char* between, Text text) {
  std::string all;
  for (const auto& item : items) all += (all.empty() ? "" : between) + text(item);
  return all;
}

std::string numbers(const std::vector<int32_t>& values, const char* between = ", ") {
  return join(values, between, [](int32_t value) { return std::to_string(value); });
}

std::string shown(const schema::Attribute& attribute, const Value& value) {
  switch (attribute.kind) {
    case schema::Kind::kFloat: return number(value.number);
    case schema::Kind::kInt: return std::to_string(value.ints.at(0));
    case schema::Kind::kInts: break;
  }
  return "(" + numbers(value.ints) + (value.ints.size() == 1 ? ",)" : ")");
}

const char* name_of(schema::Kind kind) {
  return kind == schema::Kind::kInt ? "int" : kind == schema::Kind::kInts ? "ints" : "float";
}

Value read(const schema::Op& op, const schema::Attribute& attribute, const Given& given) {
  Value value;
  for (const double each : given.values)
    if (!(std::abs(each) <= 0x7fffffff) && attribute.kind != schema::Kind::kFloat)
      throw Error(std::string(op.name) + ": attribute " + given.name + " is " + number(each) + ": must be below 2147483648");
  const bool whole = attribute.kind != schema::Kind::kFloat;
  if ((whole && given.is_float) || (attribute.kind != schema::Kind::kInts && given.values.size() != 1)) {
    const std::string got = join(given.values, ", ", [&](double each) {
      return given.is_float ? number(each) : std::to_string(static_cast<int64_t>(each));
    });
    throw Error(std::string(op.name) + ": attribute " + given.name + " is [" + got + "]: must be of kind " +
                name_of(attribute.kind));
  }
  for (const double each : given.values)
    if (whole) value.ints.push_back(static_cast<int32_t>(each));
    else value.number = static_cast<float>(each);
  return value;
}

// What attributes must be together.
void check(const schema::Op& op, const Attributes& all) {
  const auto refuse = [&](const char* name, const std::string& allowed) {
    const auto* attribute = std::find_if(op.attributes, op.attributes + op.num_attributes,
                                         [&](const schema::Attribute& each) { return std::string_view(each.name) == name; });
    throw Error(std::string(op.name) + ": attribute " + name + " is " + shown(*attribute, all.at(name)) + ": must be " + allowed);
  };
  const auto integer = [&](const char* name) { return all.at(name).ints.at(0); };
  const int heads = integer("num_heads");
  if (heads < 1) refuse("num_heads", "1 or more");
  if (op.name == std::string_view("SpanAttention")) {
    const int kv_heads = integer("kv_num_heads"), sink = integer("sink");
    if (kv_heads < 1 || heads % kv_heads) refuse("kv_num_heads", "a divisor of num_heads, " + std::to_string(heads));
    if (sink < 0) refuse("sink", "0 or more");
    const auto& capacity = all.at("capacity").ints;
    const int64_t least = int64_t{sink} + schema::kMargin;
    if (capacity.size() != size_t(kv_heads) || *std::min_element(capacity.begin(), capacity.end()) < least)
      refuse("capacity", std::to_string(kv_heads) + " numbers (kv_num_heads), each " + std::to_string(least) +
                             " or more (sink + " + std::to_string(schema::kMargin) + ")");
    for (const char* name : {"scale", "softcap"})
      if (const float value = all.at(name).number; !(value >= 0 && value < INFINITY)) refuse(name, "0 or more");
  }
  if (op.name == std::string_view("LshHash")) {
    const int bits = integer("bits"), tables = integer("tables"), signature = integer("signature_bits");
    const std::vector<int32_t> allowed(std::begin(schema::kSignatureBits), std::end(schema::kSignatureBits));
    if (signature) {
      if (std::find(allowed.begin(), allowed.end(), signature) == allowed.end())
        refuse("signature_bits", numbers(allowed) + ", or 0 with bits and tables");
      for (const char* name : {"bits", "tables"})
        if (integer(name)) refuse(name, "0 where signature_bits is given");
    } else if (bits < 1 || bits > 15) {
      refuse("bits", "1 to 15, or 0 with signature_bits");
    } else if (tables % 2 || tables < 2 || tables > 1024) {
      refuse("tables", "an even number from 2 to 1024");
    }
  }
}

// Sizes that the attributes give.
Sizes symbols(const schema::Op& op, const Attributes& attributes) {
  Sizes sizes;
  for (int i = 0; i < op.num_attributes; ++i) {
    const schema::Attribute& attribute = op.attributes[i];
    if (attribute.kind == schema::Kind::kInt) sizes[attribute.name] = attributes.at(attribute.name).ints.at(0);
  }
  if (const auto capacity = attributes.find("capacity"); capacity != attributes.end()) {
    int64_t& slots = sizes["slots"];
    for (const int32_t each : capacity->second.ints) slots += each;
  }
  if (op.name == std::string_view("LshHash")) {
    const int64_t bits = sizes["signature_bits"];
    sizes["columns"] = bits ? bits : sizes["bits"] * sizes["tables"];
    sizes["words"] = bits ? bits / 32 : sizes["tables"] / 2;
  }
  return sizes;
}

// Whether an axis can have that size; its one unknown symbol is then known.
bool solve(const std::vector<std::string>& axis, int64_t size, Sizes& sizes) {
  int64_t known = 1;
  const std::string* unknown = nullptr;
  for (const std::string& symbol : axis)
    if (const auto found = sizes.find(symbol); found != sizes.end()) known *= found->second;
    else if (unknown == nullptr) unknown = &symbol;
  if (unknown == nullptr) return known == size;
  if (known == 0 || size % known) return false;
  sizes[*unknown] = size / known;
  return true;
}

void check_head(const schema::Op& op, int64_t dim) {
  const std::vector<int32_t> allowed(std::begin(schema::kHeadDims), std::end(schema::kHeadDims));
  if (std::find(allowed.begin(), allowed.end(), dim) == allowed.end())
    throw Error(std::string(op.name) + ": a head has " + std::to_string(dim) + " elements: must be " + numbers(allowed));
}

std::string dims(const Shape& shape) {
  return "[" + join(shape, ", ", [](int64_t size) { return size < 0 ? std::string("?") : std::to_string(size); }) + "]";
}

}  // namespace

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", value);
  const bool plain = std::isfinite(value) && std::string_view(text).find_first_of(".e") == std::string_view::npos;
  return text + std::string(plain ? ".0" : "");
}

std::vector<std::vector<std::string>> axes_of(const schema::Port& port) {
  std::vector<std::vector<std::string>> axes(1, std::vector<std::string>(1));
  for (const char c : std::string_view(port.shape)) {
    if (c == ',') axes.push_back({""});
    else if (c == '*') axes.back().push_back("");
    else if (c != ' ' && c != '[' && c != ']') axes.back().back() += c;
  }
  return axes;
}

Attributes attributes_of(const schema::Op& op, const std::vector<Given>& given) {
  Attributes all;
  for (int i = 0; i < op.num_attributes; ++i) {
    const schema::Attribute& attribute = op.attributes[i];
    const auto found = std::find_if(given.begin(), given.end(), [&](const Given& each) { return each.name == attribute.name; });
    if (found != given.end()) {
      all[attribute.name] = read(op, attribute, *found);
    } else if (attribute.required) {
      throw Error(std::string(op.name) + ": attribute " + attribute.name + " is missing: must be given");
    } else {
      all[attribute.name] = read(op, attribute, {attribute.name, {attribute.fallback}, attribute.kind == schema::Kind::kFloat});
    }
  }
  for (const Given& each : given)
    if (!all.count(each.name)) {
      const std::vector<schema::Attribute> known(op.attributes, op.attributes + op.num_attributes);
      throw Error(std::string(op.name) + ": attribute " + each.name + " is unknown: must be one of " +
                  join(known, ", ", [](const schema::Attribute& attribute) { return std::string(attribute.name); }));
    }
  check(op, all);
  return all;
}

void check_input_type(const schema::Op& op, size_t count, const std::vector<std::string>& types, size_t at) {
  const schema::Port& port = op.inputs[at];
  const bool scaled = op.num_required_inputs < op.num_inputs && count == size_t(op.num_inputs);
  std::vector<std::string> allowed;
  switch (port.type) {
    case schema::Type::kT: allowed = at ? std::vector{types[0]} : std::vector<std::string>{"float16", "bfloat16"}; break;
    case schema::Type::kC: allowed = {scaled ? kFp8 : types[0]}; break;
    case schema::Type::kInt32: allowed = {"int32"}; break;
    case schema::Type::kFloat32: allowed = {"float32"}; break;
  }
  if (std::find(allowed.begin(), allowed.end(), types[at]) != allowed.end()) return;
  throw Error(std::string(op.name) + ": " + port.name + " is " + types[at] + ": must be " +
              join(allowed, " or ", [](const std::string& type) { return type; }) +
              (port.type == schema::Type::kC && scaled ? " beside key_scale and value_scale" : ""));
}

std::vector<std::string> types_of(const schema::Op& op, const std::vector<std::string>& inputs) {
  const int count = static_cast<int>(inputs.size()), least = op.num_required_inputs, most = op.num_inputs;
  if (count != least && count != most)
    throw Error(std::string(op.name) + ": " + std::to_string(count) + " inputs are given: must be " +
                (least < most ? std::to_string(least) + " or " : "") + std::to_string(most));
  for (size_t i = 0; i < inputs.size(); ++i) check_input_type(op, inputs.size(), inputs, i);
  std::vector<std::string> types;
  for (int i = 0; i < op.num_outputs; ++i) switch (op.outputs[i].type) {
      case schema::Type::kT: types.push_back(inputs[0]); break;
      case schema::Type::kC: {
        const auto* cache =
            std::find_if(op.inputs, op.inputs + most, [](const auto& port) { return port.type == schema::Type::kC; });
        types.push_back(inputs.at(size_t(cache - op.inputs)));
        break;
      }
      case schema::Type::kInt32: types.push_back("int32"); break;
      case schema::Type::kFloat32: types.push_back("float32"); break;
    }
  return types;
}

Sizes sizes_of(const schema::Op& op, const Attributes& attributes, const std::vector<Shape>& shapes) {
  Sizes sizes = symbols(op, attributes);
  for (size_t i = 0; i < shapes.size() && i < size_t(op.num_inputs); ++i) {
    const schema::Port& port = op.inputs[i];
    if (shapes[i].size() != size_t(port.rank))
      throw Error(std::string(op.name) + ": " + port.name + " has " + std::to_string(shapes[i].size()) +
                  " dimensions: must be " + port.shape);
    const auto axes = axes_of(port);
    for (size_t axis = 0; axis < axes.size(); ++axis) {
      if (shapes[i][axis] < 0 || solve(axes[axis], shapes[i][axis], sizes)) continue;
      std::vector<std::string> known;
      for (const auto& symbols : axes)
        for (const std::string& symbol : symbols)
          if (const auto found = sizes.find(symbol); found != sizes.end())
            if (std::string text = symbol + " = " + std::to_string(found->second);
                std::find(known.begin(), known.end(), text) == known.end())
              known.push_back(std::move(text));
      throw Error(std::string(op.name) + ": " + port.name + " has shape " + dims(shapes[i]) + ": must be " + port.shape + ", " +
                  join(known, ", ", [](const std::string& text) { return text; }));
    }
    if (const auto dim = sizes.find("dim"); dim != sizes.end()) check_head(op, dim->second);
  }
  return sizes;
}

std::string describe(const schema::Op& op, const Attributes& attributes) {
  std::string text = op.name;
  for (int i = 0; i < op.num_attributes; ++i) {
    const Value& value = attributes.at(op.attributes[i].name);
    const bool is_float = op.attributes[i].kind == schema::Kind::kFloat;
    text += std::string(" ") + op.attributes[i].name + "=" + (is_float ? number(value.number) : numbers(value.ints, ","));
  }
  return text;
}

}  // namespace attnspan
