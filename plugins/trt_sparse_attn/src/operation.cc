#include "operation.h"

#include <cstddef>
#include <string_view>

namespace attnspan {
namespace {

class LshHash final : public Operation {
 public:
  explicit LshHash(const Attributes& attributes)
      : heads_(attributes.at("num_heads").ints[0]), signature_(attributes.at("signature_bits").ints[0] > 0) {
    bits_ = signature_ ? 32 : attributes.at("bits").ints[0];
    count_ = signature_ ? attributes.at("signature_bits").ints[0] / 32 : attributes.at("tables").ints[0];
  }

  void prepare(const std::vector<std::string>& types, int64_t dim) override {
    const std::string kind = signature_ ? "lsh_signatures_" : "lsh_codes_";
    kernel_ = Kernel(kind + suffix_of(types[0], false, dim), current_device(), fields());
    vector_block_ = kernel_.constant("BLOCK_M"), code_block_ = kernel_.constant("BLOCK_L"), dim_ = dim;
  }

  void run(const void* const* inputs, void* const* outputs, int64_t batch, int64_t tokens, void*,
           cudaStream_t stream) const override {
    if (batch == 0 || tokens == 0) return;
    check_pointers(schema::kLshHash, schema::kLshHashInputs, inputs, 3);
    check_pointers(schema::kLshHash, schema::kLshHashOutputs, outputs, 1);
    Arguments a{};
    a.x = inputs[0], a.projection = inputs[1], a.mean = inputs[2], a.codes = outputs[0];
    a.rows = narrow(batch * tokens * heads_, "LshHash: batch * tokens * num_heads");
    a.row_vectors = static_cast<int32_t>(tokens * heads_), a.heads = heads_;
    a.mean_row = narrow(heads_ * dim_, "LshHash: num_heads * dim"), a.count = count_, a.bits = bits_;
    kernel_.launch(&a, ceil_div(a.rows, vector_block_), ceil_div(count_, code_block_), stream);
  }

 private:
  struct Arguments {
    const void *x, *projection, *mean;
    void* codes;
    int32_t rows, row_vectors, heads, mean_row, count, bits;
    const void *global_scratch, *profile_scratch;
  };

  static const std::vector<Field>& fields() {
    static const std::vector<Field> all{{"x", "*", offsetof(Arguments, x)},
                                        {"projection", "*", offsetof(Arguments, projection)},
                                        {"mean", "*", offsetof(Arguments, mean)},
                                        {"codes", "*", offsetof(Arguments, codes)},
                                        {"rows", "i32", offsetof(Arguments, rows)},
                                        {"row_vectors", "i32", offsetof(Arguments, row_vectors)},
                                        {"heads", "i32", offsetof(Arguments, heads)},
                                        {"mean_row", "i32", offsetof(Arguments, mean_row)},
                                        {"count", "i32", offsetof(Arguments, count)},
                                        {"bits", "i32", offsetof(Arguments, bits)},
                                        {"global_scratch", "*", offsetof(Arguments, global_scratch)},
                                        {"profile_scratch", "*", offsetof(Arguments, profile_scratch)}};
    return all;
  }

  const int32_t heads_;
  const bool signature_;
  int32_t bits_ = 0, count_ = 0;
  Kernel kernel_;
  int64_t vector_block_ = 0, code_block_ = 0, dim_ = 0;
};

class MergeAttention final : public Operation {
 public:
  explicit MergeAttention(const Attributes& attributes) : heads_(attributes.at("num_heads").ints[0]) {}

  void prepare(const std::vector<std::string>& types, int64_t dim) override {
    kernel_ = Kernel("merge_" + suffix_of(types[0], false, dim), current_device(), fields());
    row_block_ = kernel_.constant("BLOCK_R");
  }

  void run(const void* const* inputs, void* const* outputs, int64_t batch, int64_t tokens, void*,
           cudaStream_t stream) const override {
    if (batch == 0 || tokens == 0) return;
    check_pointers(schema::kMergeAttention, schema::kMergeAttentionInputs, inputs, 4);
    check_pointers(schema::kMergeAttention, schema::kMergeAttentionOutputs, outputs, 2);
    Arguments a{};
    a.a = inputs[0], a.a_lse = inputs[1], a.b = inputs[2], a.b_lse = inputs[3];
    a.output = outputs[0], a.lse = outputs[1];
    a.rows = narrow(batch * tokens * heads_, "MergeAttention: batch * tokens * num_heads");
    a.tokens = static_cast<int32_t>(tokens), a.heads = heads_;
    kernel_.launch(&a, ceil_div(a.rows, row_block_), 1, stream);
  }

 private:
  struct Arguments {
    const void *a, *a_lse, *b, *b_lse;
    void *output, *lse;
    int32_t rows, tokens, heads;
    const void *global_scratch, *profile_scratch;
  };

  static const std::vector<Field>& fields() {
    static const std::vector<Field> all{{"a", "*", offsetof(Arguments, a)},
                                        {"a_lse", "*", offsetof(Arguments, a_lse)},
                                        {"b", "*", offsetof(Arguments, b)},
                                        {"b_lse", "*", offsetof(Arguments, b_lse)},
                                        {"output", "*", offsetof(Arguments, output)},
                                        {"lse", "*", offsetof(Arguments, lse)},
                                        {"rows", "i32", offsetof(Arguments, rows)},
                                        {"tokens", "i32", offsetof(Arguments, tokens)},
                                        {"heads", "i32", offsetof(Arguments, heads)},
                                        {"global_scratch", "*", offsetof(Arguments, global_scratch)},
                                        {"profile_scratch", "*", offsetof(Arguments, profile_scratch)}};
    return all;
  }

  const int32_t heads_;
  Kernel kernel_;
  int64_t row_block_ = 0;
};

}  // namespace

size_t Operation::workspace(int64_t, int64_t) const { return 0; }

std::unique_ptr<Operation> make_operation(const schema::Op& op, const Attributes& attributes, bool building) {
  if (op.name == std::string_view("SpanAttention")) return make_span_attention(attributes, building);
  if (op.name == std::string_view("LshHash")) return std::make_unique<LshHash>(attributes);
  return std::make_unique<MergeAttention>(attributes);
}

void check_pointers(const schema::Op& op, const schema::Port* ports, const void* const* pointers, int count) {
  for (int i = 0; i < count; ++i)
    if (pointers[i] == nullptr || reinterpret_cast<uintptr_t>(pointers[i]) % 16)
      throw Error(std::string(op.name) + ": " + ports[i].name + " is at address " +
                  std::to_string(reinterpret_cast<uintptr_t>(pointers[i])) + ": must be a multiple of 16, and not 0");
}

std::string suffix_of(const std::string& type, bool fp8, int64_t dim) {
  return (type == "float16" ? "fp16" : "bf16") + std::string(fp8 ? "_fp8" : "") + "_d" + std::to_string(dim);
}

}  // namespace attnspan
