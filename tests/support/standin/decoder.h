// Part of the stand-in (see parallel_gpt_op.cpp): from logits to tokens, on the last pipeline stage.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "call.h"

namespace standin {

// The stand-in's random numbers: splitmix64's finalizer over (seed, number of the draw), to (0, 1]. As in the real
// op, a row's numbers depend on its seed and on its own draws alone: rows of one seed share them.
inline float uniform(uint64_t seed, uint64_t draw) {
    uint64_t z = seed * 0x9e3779b97f4a7c15ull + (draw + 1) * 0xd1b54a32d192ed03ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return static_cast<float>(((z ^ (z >> 31)) >> 40) + 1) * 0x1p-24f;
}

struct Row {
    std::vector<int> tokens;  // the real op's time axis: the prompt, its padding, what was generated
    int num_generated = 0;    // up to and with end_id
    bool finished = false;
    float cum_log_prob = 0;
};

// The ids of the `count` largest logits, largest first; the lower id first among equals.
inline std::vector<int> largest(const std::vector<float>& logits, int64_t count) {
    std::vector<int> ids(logits.size());
    std::iota(ids.begin(), ids.end(), 0);
    count = std::min<int64_t>(count, ids.size());
    std::partial_sort(ids.begin(), ids.begin() + count, ids.end(), [&](int a, int b) {
        return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
    });
    ids.resize(count);
    return ids;
}

inline double log_sum_exp(const std::vector<float>& logits) {
    const double peak = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const float logit : logits) sum += std::exp(logit - peak);
    return peak + std::log(sum);
}

class Decoder {
public:
    Decoder(const Call& call, const Config& config) : call_(call), vocab_(config.vocab_size), end_id_(config.end_id) {
        for (int64_t i = 0; i < call.batch * call.beam; ++i) {
            Row row;
            row.tokens = call.inputs[i / call.beam];
            if (i % call.beam) row.cum_log_prob = -1e20f;  // so that the first step takes all beams from beam 0
            rows_.push_back(std::move(row));
        }
        parents_.resize(rows_.size());
        std::iota(parents_.begin(), parents_.end(), 0);
    }

    // logits: [batch * max_input_len, vocab], at each token of the prompts.
    void add_prompt_log_probs(const Tensor& logits) {
        for (int64_t b = 0; b < call_.batch; ++b) {
            for (int64_t t = 0; t + 1 < call_.lengths[b]; ++t) {
                const auto at_token = one_row(logits, b * call_.max_input_len + t);
                rows_[b].cum_log_prob += at_token[call_.inputs[b][t + 1]] - log_sum_exp(at_token);
            }
        }
    }

    // logits: [batch * beam, vocab]. Appends one token to each row.
    void step(const Tensor& logits) {
        std::vector<std::vector<float>> penalized;
        for (size_t i = 0; i < rows_.size(); ++i) {
            penalized.push_back(one_row(logits, i));
            penalize(penalized.back(), rows_[i], i / call_.beam);
        }
        if (call_.beam > 1) {
            for (int64_t b = 0; b < call_.batch; ++b) best_beams(penalized, b);
        } else {
            for (int64_t b = 0; b < call_.batch; ++b) sample(penalized[b], rows_[b], call_.params[b]);
        }
    }

    const std::vector<Row>& rows() const { return rows_; }
    const std::vector<int64_t>& parents() const { return parents_; }
    bool all_finished() const {
        return std::all_of(rows_.begin(), rows_.end(), [](const Row& row) { return row.finished; });
    }

private:
    std::vector<float> one_row(const Tensor& logits, int64_t index) const {
        const float* first = logits.data_ptr<float>() + index * vocab_;
        return {first, first + vocab_};
    }

    void append(Row& row, int token) const {
        row.tokens.push_back(token);
        if (row.finished) return;
        ++row.num_generated;
        row.finished = token == end_id_;
    }

    // In the real op's order: bad words, temperature, repetition or presence penalty, min_length.
    void penalize(std::vector<float>& logits, const Row& row, int64_t batch_index) const {
        const RowParams& p = call_.params[batch_index];
        if (!call_.bad_words.empty()) ban_words(logits, row, call_.bad_words[batch_index]);
        if (p.temperature != 1)
            for (float& logit : logits) logit *= 1 / (p.temperature + 1e-6f);
        const bool has_penalty = p.repetition_penalty != 1 || p.presence_penalty != 0;
        if (has_penalty && (row.tokens.size() > 1 || call_.beam > 1)) {  // sampling spares a one-token prompt
            std::vector<bool> seen(vocab_, false);
            for (int64_t t = 0; t < static_cast<int64_t>(row.tokens.size()); ++t)
                if (t < call_.lengths[batch_index] || t >= call_.max_input_len) seen[row.tokens[t]] = true;
            for (int64_t id = 0; id < vocab_; ++id) {
                float& logit = logits[id];
                if (!seen[id]) continue;
                logit = logit < 0 ? logit * p.repetition_penalty : logit / p.repetition_penalty;
                logit -= p.presence_penalty;
            }
        }
        if (row.num_generated < p.min_length) logits[end_id_] = -std::numeric_limits<float>::max();
    }

    // A one-token word is always banned, a longer one where its other tokens came last. As in the real op, the look
    // back runs over the padded time axis (behind a shorter prompt it meets padding), and id 0 is never banned.
    void ban_words(std::vector<float>& logits, const Row& row, const BadWords& words) const {
        int begin = 0;
        for (const int end : words.ends) {
            if (end == -1) break;
            const auto first = words.tokens.begin() + begin, last = words.tokens.begin() + end - 1;
            const auto num_before = static_cast<size_t>(last - first);
            if (num_before <= row.tokens.size() && std::equal(first, last, row.tokens.end() - num_before) &&
                *last > 0 && *last < vocab_)
                logits[*last] = -std::numeric_limits<float>::infinity();
            begin = end;
        }
    }

    void sample(const std::vector<float>& logits, Row& row, const RowParams& p) const {
        if (row.finished) return append(row, end_id_);
        int64_t k = std::min<int64_t>(p.top_k, 1024);  // the real op's limit
        float top_p = std::clamp(p.top_p, 0.0f, 1.0f);
        if (k == 0 && top_p == 0) k = 1;
        if (k > 0 && top_p == 0) top_p = 1;
        const double log_sum = log_sum_exp(logits);
        const auto candidates = largest(logits, k > 0 ? k : vocab_);
        double total = 1;  // top-k draws within its candidates' share, top-p within the whole vocabulary's
        if (k > 0) {
            total = 0;
            for (const int id : candidates) total += std::exp(logits[id] - log_sum);
        }
        double left = uniform(p.random_seed, row.num_generated) * top_p * total;
        int chosen = candidates.back();
        for (const int id : candidates) {
            left -= std::exp(logits[id] - log_sum);
            if (left <= 0) {
                chosen = id;
                break;
            }
        }
        row.cum_log_prob += logits[chosen] - log_sum;
        append(row, chosen);
    }

    struct Candidate {
        int64_t parent;
        int token;
        float cum_log_prob, score;
    };

    // Plain beam search: a finished beam stays among the candidates with end_id at no cost. The real op's faults are
    // left out: it looks up a beam's length and parents with the wrong index.
    void best_beams(const std::vector<std::vector<float>>& logits, int64_t batch_index) {
        const RowParams& p = call_.params[batch_index];
        const int64_t first = batch_index * call_.beam;
        std::vector<Candidate> candidates;
        const auto consider = [&](int64_t parent, int token, float log_prob, int64_t place) {
            const Row& row = rows_[parent];
            const int64_t len = call_.max_input_len - 1 + row.num_generated + (row.finished ? 0 : 1);
            const float cum = row.cum_log_prob + log_prob;
            const float score = p.len_penalty == 0 || len == 1 ? cum : cum / std::pow(float(len), p.len_penalty);
            candidates.push_back({parent, token, cum, score + p.diversity_rate * (place % call_.beam)});
        };
        for (int64_t parent = first; parent < first + call_.beam; ++parent) {
            if (rows_[parent].finished) {
                consider(parent, end_id_, 0, 0);
                continue;
            }
            const double log_sum = log_sum_exp(logits[parent]);
            const auto best = largest(logits[parent], 2 * call_.beam);
            for (size_t place = 0; place < best.size(); ++place)
                consider(parent, best[place], logits[parent][best[place]] - log_sum, place);
        }
        std::stable_sort(candidates.begin(), candidates.end(),
                         [](const Candidate& a, const Candidate& b) { return a.score > b.score; });
        std::vector<Row> chosen;
        for (int64_t i = 0; i < call_.beam; ++i) {
            const Candidate& candidate = candidates.at(i);
            chosen.push_back(rows_[candidate.parent]);
            chosen.back().cum_log_prob = candidate.cum_log_prob;
            append(chosen.back(), candidate.token);
            parents_[first + i] = candidate.parent;
        }
        std::move(chosen.begin(), chosen.end(), rows_.begin() + first);
    }

    const Call& call_;
    int64_t vocab_;
    int end_id_;
    std::vector<Row> rows_;         // [batch * beam]
    std::vector<int64_t> parents_;  // [batch * beam], the row that each row continues
};

}  // namespace standin
