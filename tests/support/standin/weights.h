// Part of the stand-in (see parallel_gpt_op.cpp): what the lists of weights must hold on this rank, in which order.
#pragma once

#include <algorithm>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "grid.h"

namespace standin {

enum Kind { LN1_W, LN1_B, QKV_W, QKV_B, DENSE_W, DENSE_B, LN2_W, LN2_B, FC1_W, FC1_B, FC2_W, FC2_B, NUM_KINDS };
constexpr Kind kQuantized[] = {QKV_W, DENSE_W, FC1_W, FC2_W};  // the order of int8_weights and scale
constexpr int64_t kAny = -1;                                    // in an expected shape: any positive size

struct Expected {
    std::string what;
    std::vector<Shape> shapes;  // any of them; none: the tensor must be empty
};

// Indexed by Kind. A float qkv may also keep the shape of its file: the real op gets the same memory.
inline std::vector<Expected> layer_tensors(const Config& c) {
    const int64_t h = c.hidden(), h_local = h / c.tp_size, i_local = c.inter_size / c.tp_size;
    return {{"input_layernorm.weight", {{h}}},
            {"input_layernorm.bias", {{h}}},
            {"attention.query_key_value.weight", {{h, 3 * h_local}, {h, 3, h_local}}},
            {"attention.query_key_value.bias", {{3 * h_local}, {3, h_local}}},
            {"attention.dense.weight", {{h_local, h}}},
            {"attention.dense.bias", {{h}}},
            {"post_attention_layernorm.weight", {{h}}},
            {"post_attention_layernorm.bias", {{h}}},
            {"mlp.dense_h_to_4h.weight", {{h, i_local}}},
            {"mlp.dense_h_to_4h.bias", {{i_local}}},
            {"mlp.dense_4h_to_h.weight", {{i_local, h}}},
            {"mlp.dense_4h_to_h.bias", {{h}}}};
}

inline Expected in_layer(const Config& c, const Grid& grid, int64_t layer, const Expected& tensor) {
    const int64_t stage = layer / c.layers_local();
    const std::string what = "layer " + std::to_string(layer) + " " + tensor.what;
    if (stage == grid.pp_rank) return {what, tensor.shapes};
    return {what + ", of pipeline stage " + std::to_string(stage) + ", not this rank's stage " +
                std::to_string(grid.pp_rank),
            {}};
}

inline std::vector<Expected> expected_weights(const Config& c, const Grid& grid) {
    std::vector<Expected> list;
    const auto table = layer_tensors(c);
    for (int kind = 0; kind < NUM_KINDS; ++kind) {
        const bool quantized = std::count(std::begin(kQuantized), std::end(kQuantized), kind) > 0;
        for (int64_t layer = 0; layer < c.layer_num; ++layer) {
            Expected one = in_layer(c, grid, layer, table[kind]);
            if (c.int8_mode == 1 && quantized) one = {one.what + ", which int8_mode 1 passes in int8_weights", {}};
            list.push_back(std::move(one));
        }
    }
    const int64_t h = c.hidden();
    const auto add_pair = [&](const std::string& name) {
        list.push_back({name + ".weight", {{h}}});
        list.push_back({name + ".bias", {{h}}});
    };
    if (c.has_pre_layernorm) add_pair("pre_decoder_layernorm");
    if (c.has_final_layernorm) add_pair("final_layernorm");
    if (c.has_wpe) list.push_back({"wpe", {{kAny, h}}});
    list.push_back({"wte", {{c.vocab_size, h}}});
    list.push_back({"lm_head.weight", {{c.vocab_size, h}}});
    for (int64_t layer = 0; layer < c.layer_num; ++layer)
        list.push_back({"layer " + std::to_string(layer) + " MoE gate", {}});
    return list;
}

inline std::vector<Expected> expected_int8(const Config& c, const Grid& grid, bool scales) {
    std::vector<Expected> list;
    if (c.int8_mode != 1) return list;
    const auto table = layer_tensors(c);
    for (const Kind kind : kQuantized) {
        const Shape matrix = table[kind].shapes.front();
        const Expected tensor = {table[kind].what, {scales ? Shape{matrix.back()} : matrix}};
        for (int64_t layer = 0; layer < c.layer_num; ++layer) list.push_back(in_layer(c, grid, layer, tensor));
    }
    return list;
}

inline bool fits(const Tensor& tensor, const Shape& shape) {
    if (tensor.dim() != static_cast<int64_t>(shape.size())) return false;
    for (size_t axis = 0; axis < shape.size(); ++axis) {
        const int64_t size = tensor.size(axis);
        if (shape[axis] == kAny ? size < 1 : size != shape[axis]) return false;
    }
    return true;
}

inline std::string in_words(const std::vector<Shape>& shapes) {
    if (shapes.empty()) return "an empty tensor";
    std::ostringstream out;
    for (size_t i = 0; i < shapes.size(); ++i) {
        out << (i ? " or [" : "shape [");
        for (size_t axis = 0; axis < shapes[i].size(); ++axis)
            out << (axis ? ", " : "") << (shapes[i][axis] == kAny ? "any" : std::to_string(shapes[i][axis]));
        out << "]";
    }
    return out.str();
}

inline void check_list(const char* name, const std::vector<Tensor>& list, const std::vector<Expected>& expected,
                       ScalarType dtype) {
    TORCH_CHECK(list.size() == expected.size(), "stand-in: ", name, " has ", list.size(), " tensors, expected ",
                expected.size());
    for (size_t i = 0; i < list.size(); ++i) {
        const Tensor& tensor = list[i];
        const auto& shapes = expected[i].shapes;
        std::ostringstream out;
        out << "stand-in: " << name << "[" << i << "] (" << expected[i].what << "): expected ";
        const std::string where = out.str();
        TORCH_CHECK(tensor.defined() && tensor.device().is_cpu(), where, "a CPU tensor");
        TORCH_CHECK(tensor.scalar_type() == dtype, where, "data type ", dtype, ", got ", tensor.scalar_type());
        TORCH_CHECK(tensor.is_contiguous(), where, "a contiguous tensor");
        const bool right = shapes.empty() ? tensor.numel() == 0
                                          : std::any_of(shapes.begin(), shapes.end(),
                                                        [&](const Shape& shape) { return fits(tensor, shape); });
        TORCH_CHECK(right, where, in_words(shapes), ", got ", in_words({tensor.sizes().vec()}));
    }
}

inline void check_weights(const Config& c, const Grid& grid, const std::vector<Tensor>& weights,
                          const std::vector<Tensor>& int8_weights, const std::vector<Tensor>& scale) {
    const ScalarType dtype = weights.empty() ? at::kFloat : weights[0].scalar_type();
    TORCH_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16,
                "stand-in: weights must be float32, float16 or bfloat16, got ", dtype);
    TORCH_CHECK(c.int8_mode == 0 || dtype != at::kFloat, "stand-in: int8_mode 1 needs float16 or bfloat16 weights");
    check_list("weights", weights, expected_weights(c, grid), dtype);
    check_list("int8_weights", int8_weights, expected_int8(c, grid, false), at::kChar);
    check_list("scale", scale, expected_int8(c, grid, true), dtype);
}

}  // namespace standin
