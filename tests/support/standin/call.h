// Part of the stand-in (see parallel_gpt_op.cpp): the arguments of one call of forward, read and checked.
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "grid.h"

namespace standin {

struct Arguments {
    Tensor input_ids, input_lengths;
    int64_t output_len;
    std::optional<int64_t> beam_width;
    OptionalTensor top_k, top_p, diversity_rate, temperature, len_penalty, repetition_penalty, presence_penalty,
        min_length, random_seed, bad_words_list;
    std::optional<int64_t> return_cum_log_probs;
};

struct RowParams {
    int64_t top_k = 0, min_length = 0, random_seed = 0;
    float top_p = 0, diversity_rate = 0, temperature = 1, len_penalty = 0;
    float repetition_penalty = 1, presence_penalty = 0;
};

struct BadWords {
    std::vector<int> tokens;  // the words' tokens, one word behind the other
    std::vector<int> ends;    // where each word ends in tokens; -1 pads
};

struct Call {
    int64_t batch = 0, beam = 1, max_input_len = 0, output_len = 0, cum_log_probs = 0;
    std::vector<std::vector<int>> inputs;  // [batch], padded to max_input_len
    std::vector<int> lengths;              // [batch]
    std::vector<RowParams> params;         // [batch]
    std::vector<BadWords> bad_words;       // [batch], or none
};

inline void check_tensor(const Tensor& tensor, const char* name, ScalarType dtype, int64_t dims) {
    TORCH_CHECK(tensor.device().is_cpu(), "stand-in: ", name, " must be on the CPU, got ", tensor.device());
    TORCH_CHECK(tensor.scalar_type() == dtype, "stand-in: ", name, " must be ", dtype, ", got ", tensor.scalar_type());
    TORCH_CHECK(tensor.is_contiguous(), "stand-in: ", name, " must be contiguous");
    TORCH_CHECK(tensor.dim() == dims, "stand-in: ", name, " must have ", dims, " dimensions, got ", tensor.sizes());
}

inline Call read_inputs(const Arguments& a, const Config& config) {
    check_tensor(a.input_ids, "input_ids", at::kInt, 2);
    check_tensor(a.input_lengths, "input_lengths", at::kInt, 1);
    Call call;
    call.batch = a.input_ids.size(0);
    call.max_input_len = a.input_ids.size(1);
    TORCH_CHECK(call.batch > 0 && call.max_input_len > 0, "stand-in: input_ids is empty: ", a.input_ids.sizes());
    TORCH_CHECK(a.input_lengths.size(0) == call.batch, "stand-in: input_lengths must be of shape [", call.batch,
                "], got ", a.input_lengths.sizes());
    const int* ids = a.input_ids.data_ptr<int>();
    for (int64_t row = 0; row < call.batch; ++row, ids += call.max_input_len) {
        const int length = a.input_lengths.data_ptr<int>()[row];
        TORCH_CHECK(length >= 1 && length <= call.max_input_len, "stand-in: input_lengths[", row, "] must be 1 to ",
                    call.max_input_len, ", got ", length);
        call.lengths.push_back(length);
        call.inputs.emplace_back(ids, ids + call.max_input_len);
        for (const int id : call.inputs.back())  // padding too: the real op looks it up as well
            TORCH_CHECK(id >= 0 && id < config.vocab_size, "stand-in: input_ids[", row, "] has id ", id,
                        " outside the vocabulary of ", config.vocab_size);
    }
    return call;
}

inline void read_sizes(const Arguments& a, const Config& config, int64_t max_positions, Call& call) {
    call.output_len = a.output_len;
    call.beam = a.beam_width.value_or(1);
    call.cum_log_probs = a.return_cum_log_probs.value_or(0);
    TORCH_CHECK(call.output_len >= 1, "stand-in: output_len must be at least 1, got ", call.output_len);
    TORCH_CHECK(call.output_len <= max_positions - call.max_input_len, "stand-in: max_input_len ", call.max_input_len,
                " + output_len ", call.output_len, " is more than the model's positions ", max_positions);
    TORCH_CHECK(call.beam >= 1 && call.beam <= 64, "stand-in: beam_width must be 1 to 64, got ", call.beam);
    TORCH_CHECK(call.cum_log_probs >= 0 && call.cum_log_probs <= 2, "stand-in: return_cum_log_probs must be 0 (none),"
                " 1 (of the generated tokens) or 2 (of prompt and generated tokens), got ", call.cum_log_probs);
    TORCH_CHECK(call.cum_log_probs != 2 || config.has_final_layernorm, "stand-in: return_cum_log_probs 2 needs a"
                " final_layernorm: the real op applies it without looking at the flag");
    TORCH_CHECK(call.cum_log_probs != 2 || call.beam == 1, "stand-in: return_cum_log_probs 2 needs beam_width 1: the"
                " real op overwrites the scores that keep the first beams apart");
}

// The real op takes one value for the whole batch, [1], or one a row, [batch].
template <typename T, typename Field>
void read_param(const OptionalTensor& tensor, const char* name, ScalarType dtype, Call& call, Field field) {
    if (!tensor.has_value()) return;
    check_tensor(*tensor, name, dtype, 1);
    TORCH_CHECK(tensor->numel() == 1 || tensor->numel() == call.batch, "stand-in: ", name, " must be of shape [1] or [",
                call.batch, "], got ", tensor->sizes());
    for (int64_t row = 0; row < call.batch; ++row) {
        const T value = tensor->data_ptr<T>()[tensor->numel() == 1 ? 0 : row];
        TORCH_CHECK(std::isfinite(static_cast<double>(value)), "stand-in: ", name, " must be finite, got ", value);
        call.params[row].*field = value;
    }
}

// Read by beam search too, where the real op takes the first row's value for the whole batch.
template <typename T, typename Field>
void read_beam_param(const OptionalTensor& tensor, const char* name, ScalarType dtype, Call& call, Field field) {
    read_param<T>(tensor, name, dtype, call, field);
    for (const RowParams& row : call.params)
        TORCH_CHECK(call.beam == 1 || row.*field == call.params[0].*field, "stand-in: with beams, ", name,
                    " must be the same for the whole batch: the real op applies the first row's value to all");
}

inline void read_bad_words(const Tensor& tensor, Call& call) {
    check_tensor(tensor, "bad_words_list", at::kInt, 3);
    TORCH_CHECK(tensor.size(0) == call.batch && tensor.size(1) == 2, "stand-in: bad_words_list must be of shape [",
                call.batch, ", 2, len], got ", tensor.sizes());
    const int64_t len = tensor.size(2);
    const int* values = tensor.data_ptr<int>();
    for (int64_t row = 0; row < call.batch; ++row, values += 2 * len) {
        BadWords words{{values, values + len}, {values + len, values + 2 * len}};
        int previous = 0;
        for (const int end : words.ends) {
            TORCH_CHECK(end == -1 || (previous != -1 && end > previous && end <= len), "stand-in: bad_words_list[",
                        row, ", 1] must hold the rising ends of its words, then -1");
            previous = end;
        }
        call.bad_words.push_back(std::move(words));
    }
}

inline Call read_call(const Arguments& a, const Config& config, int64_t max_positions) {
    Call call = read_inputs(a, config);
    read_sizes(a, config, max_positions, call);
    call.params.resize(call.batch);
    TORCH_CHECK(!a.repetition_penalty || !a.presence_penalty,
                "stand-in: repetition_penalty and presence_penalty exclude each other");
    read_param<int>(a.top_k, "top_k", at::kInt, call, &RowParams::top_k);
    read_param<float>(a.top_p, "top_p", at::kFloat, call, &RowParams::top_p);
    read_param<int64_t>(a.random_seed, "random_seed", at::kLong, call, &RowParams::random_seed);
    using P = RowParams;
    read_beam_param<float>(a.diversity_rate, "beam_search_diversity_rate", at::kFloat, call, &P::diversity_rate);
    read_beam_param<float>(a.temperature, "temperature", at::kFloat, call, &P::temperature);
    read_beam_param<float>(a.len_penalty, "len_penalty", at::kFloat, call, &P::len_penalty);
    read_beam_param<float>(a.repetition_penalty, "repetition_penalty", at::kFloat, call, &P::repetition_penalty);
    read_beam_param<float>(a.presence_penalty, "presence_penalty", at::kFloat, call, &P::presence_penalty);
    read_beam_param<int>(a.min_length, "min_length", at::kInt, call, &P::min_length);
    for (const RowParams& row : call.params)
        TORCH_CHECK(row.top_k >= 0, "stand-in: top_k must not be negative, got ", row.top_k);
    if (a.bad_words_list) read_bad_words(*a.bad_words_list, call);
    return call;
}

// FNV-1a over all of one call's arguments.
class Digest {
public:
    explicit Digest(const Arguments& a) {
        for (const int64_t value : {a.output_len, a.beam_width.value_or(-1), a.return_cum_log_probs.value_or(-1)})
            add(&value, sizeof value);
        for (const auto& tensor : {OptionalTensor(a.input_ids), OptionalTensor(a.input_lengths), a.top_k, a.top_p,
                                   a.diversity_rate, a.temperature, a.len_penalty, a.repetition_penalty,
                                   a.presence_penalty, a.min_length, a.random_seed, a.bad_words_list})
            add(tensor);
    }

    bool same_on(MPI_Comm comm) const {
        uint64_t both[2] = {hash_, ~hash_};  // the least of ~hash is ~ of the greatest hash
        MPI_Allreduce(MPI_IN_PLACE, both, 2, MPI_UINT64_T, MPI_MIN, comm);
        return both[0] == ~both[1];
    }

private:
    void add(const void* data, size_t num_bytes) {
        for (size_t i = 0; i < num_bytes; ++i)
            hash_ = (hash_ ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211ull;
    }

    void add(const OptionalTensor& tensor) {
        const int64_t dims = tensor.has_value() ? tensor->dim() : -1;
        add(&dims, sizeof dims);
        if (!tensor.has_value()) return;
        const Tensor flat = tensor->cpu().contiguous();
        const auto dtype = flat.scalar_type();
        add(&dtype, sizeof dtype);
        add(flat.sizes().data(), dims * sizeof(int64_t));
        add(flat.data_ptr(), flat.nbytes());
    }

    uint64_t hash_ = 14695981039346656037ull;
};

}  // namespace standin
