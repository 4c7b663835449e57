// A test double of FasterTransformer's TorchScript op `FasterTransformer::ParallelGptOp`, called the stand-in.
// Tests load it where they cannot have the real libth_transformer.so. It is written from the op's contract
// (DESIGN.md, section 5, and the published source of the real op), shares no code with it, and serves nobody.
//
// What it checks, and the real op mostly does not: the number, data type, contiguity and shape of every weight for
// this rank's tensor-parallel shard and pipeline stage; device, data type, shape and range of every argument of
// forward; that MPI is initialized with tp * pp ranks; that all ranks call forward with the same arguments. What one
// rank refuses throws on all of them, so that a test fails instead of hanging.
//
// What it computes: a GPT-2-family forward in fp32 on the CPU, with tensor parallelism over MPI_Allreduce, pipeline
// stages over MPI_Send and MPI_Recv, one static batch, a KV cache, greedy, top-k, top-p and plain beam search. The
// penalties, the order in which they apply, and the meaning of the results are the real op's.
//
// What it does not do: CUDA, reduced precision (fp16 and bf16 weights are upcast), ALiBi, post_layernorm, adapters,
// MoE, int8_mode 2 (each throws "stand-in does not compute X"), curand's random numbers (see `uniform`), the int8
// layout that the real library permutes for the GPU, and the real op's known faults with beams (see `best_beams`).

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "decoder.h"
#include "model.h"

namespace standin {

class ParallelGptOp : public torch::CustomClassHolder {
public:
    ParallelGptOp(int64_t head_num, int64_t size_per_head, int64_t inter_size, int64_t layer_num, int64_t expert_num,
                  int64_t moe_k, std::vector<int64_t> moe_layer_index, int64_t vocab_size, int64_t start_id,
                  int64_t end_id, int64_t tensor_para_size, int64_t pipeline_para_size, int64_t int8_mode,
                  double layernorm_eps, std::string layernorm_type, std::string activation_type,
                  bool has_positional_encoding, bool has_pre_decoder_layernorm, bool has_post_decoder_layernorm,
                  bool has_adapters, int64_t adapter_inter_size, bool use_attention_linear_bias,
                  std::vector<Tensor> weights, std::vector<Tensor> int8_weights, std::vector<Tensor> scale,
                  double shared_contexts_ratio)
        : config_{head_num, size_per_head, inter_size, layer_num, vocab_size, end_id, tensor_para_size,
                  pipeline_para_size, int8_mode, layernorm_eps, activation_type == "relu" || activation_type == "Relu",
                  has_positional_encoding, has_pre_decoder_layernorm, has_post_decoder_layernorm},
          grid_(place_rank(tensor_para_size, pipeline_para_size)) {
        check_together(MPI_COMM_WORLD, [&] {
            check_sizes();
            const bool gelu = activation_type == "gelu" || activation_type == "Gelu";
            TORCH_CHECK(gelu || config_.relu, "stand-in does not compute activation_type ", activation_type);
            TORCH_CHECK(layernorm_type == "pre_layernorm", "stand-in does not compute layernorm_type ", layernorm_type);
            TORCH_CHECK(expert_num == 0 && moe_layer_index.empty(), "stand-in does not compute MoE");
            TORCH_CHECK(!has_adapters, "stand-in does not compute adapters");
            TORCH_CHECK(!use_attention_linear_bias, "stand-in does not compute ALiBi (use_attention_linear_bias)");
            TORCH_CHECK(int8_mode == 0 || int8_mode == 1, "stand-in does not compute int8_mode ", int8_mode);
            check_weights(config_, grid_, weights, int8_weights, scale);
        });
        connect(grid_);
        model_.emplace(config_, grid_, weights, int8_weights, scale);
    }

    std::vector<Tensor> forward(Tensor input_ids, Tensor input_lengths, int64_t output_len,
                                std::optional<int64_t> beam_width, OptionalTensor top_k, OptionalTensor top_p,
                                OptionalTensor beam_search_diversity_rate, OptionalTensor temperature,
                                OptionalTensor len_penalty, OptionalTensor repetition_penalty,
                                OptionalTensor presence_penalty, OptionalTensor min_length, OptionalTensor random_seed,
                                OptionalTensor bad_words_list, std::optional<int64_t> return_cum_log_probs) {
        const at::NoGradGuard no_grad;
        const Arguments arguments{input_ids, input_lengths, output_len, beam_width, top_k, top_p,
                                  beam_search_diversity_rate, temperature, len_penalty, repetition_penalty,
                                  presence_penalty, min_length, random_seed, bad_words_list, return_cum_log_probs};
        const bool same = Digest(arguments).same_on(grid_.world);
        TORCH_CHECK(same, "stand-in: the ranks called forward with different arguments");
        // The same arguments fail the same checks on every rank, so these need no agreement.
        const Call call = read_call(arguments, config_, model_->max_positions());
        return results(call, generate(call));
    }

private:
    void check_sizes() const {
        const Config& c = config_;
        TORCH_CHECK(c.head_num > 0 && c.size_per_head > 0 && c.inter_size > 0 && c.layer_num > 0 && c.vocab_size > 0,
                    "stand-in: head_num, size_per_head, inter_size, layer_num and vocab_size must be positive");
        TORCH_CHECK(c.head_num % c.tp_size == 0 && c.inter_size % c.tp_size == 0, "stand-in: head_num ", c.head_num,
                    " and inter_size ", c.inter_size, " must be multiples of tensor_para_size ", c.tp_size);
        TORCH_CHECK(c.layer_num % c.pp_size == 0, "stand-in: layer_num ", c.layer_num,
                    " must be a multiple of pipeline_para_size ", c.pp_size);
        TORCH_CHECK(c.end_id >= 0 && c.end_id < c.vocab_size, "stand-in: end_id ", c.end_id,
                    " is outside the vocabulary of ", c.vocab_size);
    }

    // Runs the batch. Every stage takes part in every step; the last one decides and tells the others.
    std::vector<Row> generate(const Call& call) {
        const int64_t num_rows = call.batch * call.beam, len = call.max_input_len;
        std::vector<int64_t> prompts, num_tokens;
        for (int64_t i = 0; i < num_rows; ++i) {
            prompts.insert(prompts.end(), call.inputs[i / call.beam].begin(), call.inputs[i / call.beam].end());
            num_tokens.push_back(call.lengths[i / call.beam]);
        }
        const Tensor lengths = at::tensor(num_tokens, at::kLong);                    // [rows]
        Tensor ids = at::tensor(prompts, at::kLong).view({num_rows, len});           // [rows, len], then [rows, 1]
        Tensor positions = at::arange(len, at::kLong).expand({num_rows, len});       // as ids
        Tensor last = at::arange(num_rows, at::kLong) * len + lengths - 1;           // in the flattened ids
        model_->start(num_rows, len + call.output_len);
        Decoder decoder(call, config_);
        for (int64_t step = 0; step < call.output_len; ++step) {
            const Tensor hidden = model_->run_stage(ids, positions).flatten(0, 1);
            std::vector<int64_t> decided(2 * num_rows + 1);  // tokens, parents, whether to stop
            if (grid_.last_stage()) {
                if (step == 0 && call.cum_log_probs == 2) decoder.add_prompt_log_probs(model_->logits(hidden));
                decoder.step(model_->logits(hidden.index_select(0, last)));
                for (int64_t i = 0; i < num_rows; ++i) decided[i] = decoder.rows()[i].tokens.back();
                std::copy_n(decoder.parents().begin(), num_rows, decided.begin() + num_rows);
                decided.back() = decoder.all_finished();
            }
            broadcast_from_last_stage(grid_, decided);
            if (decided.back()) break;
            const Tensor all = at::tensor(decided, at::kLong);
            ids = all.narrow(0, 0, num_rows).unsqueeze(1);
            positions = (lengths + step).unsqueeze(1);
            last = at::arange(num_rows, at::kLong);
            if (call.beam > 1) model_->reorder(all.narrow(0, num_rows, num_rows));
        }
        return decoder.rows();
    }

    // output_ids: prompt, generated tokens, then end_id; the prompt's padding is taken out. sequence_lengths: as the
    // real op reports it, max_input_len (not the row's own length) + generated tokens with end_id. The real op's
    // results are valid on the first stage only; here every rank has them.
    std::vector<Tensor> results(const Call& call, const std::vector<Row>& rows) const {
        const int64_t total_len = call.max_input_len + call.output_len;
        std::vector<int> ids(rows.size() * total_len, static_cast<int>(config_.end_id)), lengths(rows.size());
        std::vector<float> log_probs(rows.size());
        for (size_t i = 0; i < rows.size() && grid_.last_stage(); ++i) {
            const auto tokens = rows[i].tokens.begin();
            const auto prompt_end = std::copy_n(tokens, call.lengths[i / call.beam], ids.begin() + i * total_len);
            std::copy_n(tokens + call.max_input_len, rows[i].num_generated, prompt_end);
            lengths[i] = static_cast<int>(call.max_input_len) + rows[i].num_generated;
            log_probs[i] = rows[i].cum_log_prob;
        }
        broadcast_from_last_stage(grid_, ids);
        broadcast_from_last_stage(grid_, lengths);
        broadcast_from_last_stage(grid_, log_probs);
        std::vector<Tensor> outputs = {at::tensor(ids, at::kInt).view({call.batch, call.beam, total_len}),
                                       at::tensor(lengths, at::kInt).view({call.batch, call.beam})};
        if (call.cum_log_probs > 0) outputs.push_back(at::tensor(log_probs, at::kFloat).view({call.batch, call.beam}));
        return outputs;
    }

    Config config_;
    Grid grid_;
    std::optional<Model> model_;
};

// [rows, cols] or [n, rows, cols] -> {int8 of the same shape, scales [cols] or [n, cols] in the weight's data type}.
// One scale a column, max|column| / 128, and rounding half away from zero, as in the real library.
std::vector<Tensor> quantize(Tensor weight, ScalarType quant_type) {
    TORCH_CHECK(quant_type == at::kChar, "stand-in does not compute quantization to ", quant_type);
    TORCH_CHECK(weight.device().is_cpu() && weight.is_contiguous(), "stand-in: weight must be contiguous, on the CPU");
    TORCH_CHECK(weight.numel() > 0 && (weight.dim() == 2 || weight.dim() == 3),
                "stand-in: weight must have 2 or 3 dimensions and not be empty, got ", weight.sizes());
    const auto dtype = weight.scalar_type();
    TORCH_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16,
                "stand-in: weight must be float32, float16 or bfloat16, got ", dtype);
    const Tensor values = weight.detach().to(at::kFloat);
    const Tensor scales = values.abs().amax(-2) / 128;
    const Tensor scaled = (values / scales.unsqueeze(-2)).nan_to_num(0);  // a column of zeros
    const Tensor rounded = scaled.sign() * (scaled.abs() + 0.5).floor();
    return {rounded.clamp(-128, 127).to(at::kChar), scales.to(dtype)};
}

}  // namespace standin

TORCH_LIBRARY(FasterTransformer, m) {
    m.class_<standin::ParallelGptOp>("ParallelGptOp")
        .def(torch::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, std::vector<int64_t>, int64_t, int64_t,
                         int64_t, int64_t, int64_t, int64_t, double, std::string, std::string, bool, bool, bool, bool,
                         int64_t, bool, std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>,
                         double>())
        .def("forward", &standin::ParallelGptOp::forward);
}

TORCH_LIBRARY(fastertransformer, m) {
    m.def("symmetric_quantize_last_axis_of_batched_matrix(Tensor weight, ScalarType quant_type) -> Tensor[]",
          standin::quantize);
}
