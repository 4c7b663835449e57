// Part of the stand-in (see parallel_gpt_op.cpp): the layers of one rank, in fp32 on the CPU.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>
#include <vector>

#include "weights.h"

namespace standin {

class Model {
public:
    Model(const Config& config, const Grid& grid, const std::vector<Tensor>& weights,
          const std::vector<Tensor>& int8_weights, const std::vector<Tensor>& scale)
        : c_(config), grid_(grid) {
        for (const Tensor& weight : weights) weights_.push_back(weight.detach().to(at::kFloat));
        for (size_t i = 0; i < int8_weights.size(); ++i) {
            const size_t kind = kQuantized[i / c_.layer_num], layer = i % c_.layer_num;
            weights_[kind * c_.layer_num + layer] = int8_weights[i].to(at::kFloat) * scale[i].to(at::kFloat);
        }
        size_t next = NUM_KINDS * c_.layer_num;
        if (c_.has_pre_layernorm) pre_layernorm_ = next, next += 2;
        if (c_.has_final_layernorm) final_layernorm_ = next, next += 2;
        if (c_.has_wpe) wpe_ = weights_[next++];
        wte_ = weights_[next++];
        lm_head_ = weights_[next];
    }

    int64_t max_positions() const {
        return c_.has_wpe ? wpe_.size(0) : std::numeric_limits<int64_t>::max();
    }

    void start(int64_t num_rows, int64_t max_len) {
        const Shape shape = {num_rows, max_len, c_.heads_local(), c_.size_per_head};
        keys_.clear(), values_.clear();
        for (int64_t layer = 0; layer < c_.layers_local(); ++layer) {
            keys_.push_back(at::zeros(shape, at::kFloat));
            values_.push_back(at::zeros(shape, at::kFloat));
        }
    }

    void reorder(const Tensor& parents) {
        for (Tensor& cache : keys_) cache = cache.index_select(0, parents);
        for (Tensor& cache : values_) cache = cache.index_select(0, parents);
    }

    // ids, positions: int64 [rows, len]. Returns [rows, len, hidden]; meaningful on the last stage only.
    Tensor run_stage(const Tensor& ids, const Tensor& positions) {
        const Shape shape = {ids.size(0), ids.size(1), c_.hidden()};
        Tensor x;
        if (grid_.first_stage()) {
            x = wte_.index_select(0, ids.flatten()).view(shape);
            if (c_.has_wpe) x = x + wpe_.index_select(0, positions.flatten()).view(shape);
            if (c_.has_pre_layernorm) x = layernorm(x, pre_layernorm_);
        } else {
            x = at::empty(shape, at::kFloat);
            MPI_Recv(x.data_ptr<float>(), static_cast<int>(x.numel()), MPI_FLOAT, grid_.pp_rank - 1, 0, grid_.pp,
                     MPI_STATUS_IGNORE);
        }
        for (int64_t local = 0; local < c_.layers_local(); ++local) x = run_layer(x, positions, local);
        if (!grid_.last_stage()) {
            x = x.contiguous();
            MPI_Send(x.data_ptr<float>(), static_cast<int>(x.numel()), MPI_FLOAT, grid_.pp_rank + 1, 0, grid_.pp);
        }
        return x;
    }

    // hidden: [n, hidden] -> [n, vocab]. Each tp rank computes its slice of the vocabulary; zeros fill the rest.
    Tensor logits(Tensor hidden) const {
        if (c_.has_final_layernorm) hidden = layernorm(hidden, final_layernorm_);
        const int64_t slice = (c_.vocab_size + c_.tp_size - 1) / c_.tp_size;
        const int64_t begin = std::min(c_.vocab_size, grid_.tp_rank * slice);
        const int64_t len = std::min(c_.vocab_size, begin + slice) - begin;
        Tensor all = at::zeros({hidden.size(0), c_.vocab_size}, at::kFloat);
        all.narrow(1, begin, len).copy_(hidden.matmul(lm_head_.narrow(0, begin, len).t()));
        return sum_over(grid_.tp, all);
    }

private:
    const Tensor& weight(Kind kind, int64_t local_layer) const {
        return weights_[kind * c_.layer_num + grid_.pp_rank * c_.layers_local() + local_layer];
    }

    Tensor layernorm(const Tensor& x, size_t index) const {
        return at::layer_norm(x, {c_.hidden()}, weights_[index], weights_[index + 1], c_.layernorm_eps);
    }

    Tensor run_layer(Tensor x, const Tensor& positions, int64_t local) {
        const auto norm = [&](const Tensor& y, Kind gamma, Kind beta) {
            return at::layer_norm(y, {c_.hidden()}, weight(gamma, local), weight(beta, local), c_.layernorm_eps);
        };
        // A row-parallel product is summed over the tp group first; its bias is then added once.
        const Tensor context = attend(norm(x, LN1_W, LN1_B), positions, local);
        x = x + sum_over(grid_.tp, context.matmul(weight(DENSE_W, local))) + weight(DENSE_B, local);
        Tensor inner = norm(x, LN2_W, LN2_B).matmul(weight(FC1_W, local)) + weight(FC1_B, local);
        inner = c_.relu ? inner.relu() : at::gelu(inner, "tanh");
        return x + sum_over(grid_.tp, inner.matmul(weight(FC2_W, local))) + weight(FC2_B, local);
    }

    // The cache slot of a token is its position in its own row. Right padding of a prompt therefore lies behind every
    // query until the generated tokens overwrite it, and the causal mask is the only mask needed.
    Tensor attend(const Tensor& x, const Tensor& positions, int64_t local) {
        const int64_t rows = x.size(0), len = x.size(1), heads = c_.heads_local(), dim = c_.size_per_head;
        const Tensor qkv_weight = weight(QKV_W, local).reshape({c_.hidden(), 3 * heads * dim});
        const Tensor qkv_bias = weight(QKV_B, local).reshape({3 * heads * dim});
        const Tensor qkv = (x.matmul(qkv_weight) + qkv_bias).view({rows, len, 3, heads, dim});
        const Tensor row = at::arange(rows, at::kLong).unsqueeze(1).expand({rows, len});
        const c10::List<OptionalTensor> slots({OptionalTensor(row), OptionalTensor(positions)});
        keys_[local].index_put_(slots, qkv.select(2, 1));
        values_[local].index_put_(slots, qkv.select(2, 2));

        const int64_t num_slots = positions.max().item<int64_t>() + 1;
        const Tensor query = qkv.select(2, 0).transpose(1, 2);                           // [rows, heads, len, dim]
        const Tensor keys = keys_[local].narrow(1, 0, num_slots).permute({0, 2, 3, 1});  // [rows, heads, dim, slots]
        const Tensor values = values_[local].narrow(1, 0, num_slots).transpose(1, 2);    // [rows, heads, slots, dim]
        const Tensor future = at::arange(num_slots, at::kLong) > positions.unsqueeze(-1);  // [rows, len, slots]
        Tensor scores = query.matmul(keys) / std::sqrt(static_cast<double>(dim));
        scores = scores.masked_fill(future.unsqueeze(1), -std::numeric_limits<float>::infinity());
        return scores.softmax(-1).matmul(values).transpose(1, 2).reshape({rows, len, heads * dim});
    }

    Config c_;
    Grid grid_;
    std::vector<Tensor> weights_;  // fp32, indexed as the op's list
    size_t pre_layernorm_ = 0, final_layernorm_ = 0;
    Tensor wpe_, wte_, lm_head_;
    std::vector<Tensor> keys_, values_;  // a local layer each: [rows, max_len, heads_local, dim]
};

}  // namespace standin
