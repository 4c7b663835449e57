// Part of the stand-in (see parallel_gpt_op.cpp): the op's configuration, and this rank's place among the others.
#pragma once

#include <mpi.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace standin {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

struct Config {
    int64_t head_num, size_per_head, inter_size, layer_num, vocab_size, end_id, tp_size, pp_size, int8_mode;
    double layernorm_eps;
    bool relu, has_wpe, has_pre_layernorm, has_final_layernorm;

    int64_t hidden() const { return head_num * size_per_head; }
    int64_t heads_local() const { return head_num / tp_size; }
    int64_t layers_local() const { return layer_num / pp_size; }
};

struct Grid {
    int rank = 0, tp_rank = 0, pp_rank = 0, pp_size = 1;
    MPI_Comm world = MPI_COMM_NULL, tp = MPI_COMM_NULL, pp = MPI_COMM_NULL;

    bool first_stage() const { return pp_rank == 0; }
    bool last_stage() const { return pp_rank == pp_size - 1; }
};

inline Grid place_rank(int64_t tp_size, int64_t pp_size) {
    int initialized = 0, world_size = 0;
    MPI_Initialized(&initialized);
    TORCH_CHECK(initialized, "stand-in: MPI is not initialized; import mpi4py.MPI before building the op");
    Grid grid;
    MPI_Comm_rank(MPI_COMM_WORLD, &grid.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world_size);
    TORCH_CHECK(tp_size > 0 && pp_size > 0 && tp_size * pp_size == world_size, "stand-in: tensor_para_size ", tp_size,
                " x pipeline_para_size ", pp_size, " must equal the MPI world size ", world_size);
    grid.tp_rank = grid.rank % static_cast<int>(tp_size);
    grid.pp_rank = grid.rank / static_cast<int>(tp_size);
    grid.pp_size = static_cast<int>(pp_size);
    return grid;
}

// The communicators are never freed: MPI_Comm_free is collective, and Python's garbage collection is not.
inline void connect(Grid& grid) {
    MPI_Comm_dup(MPI_COMM_WORLD, &grid.world);
    MPI_Comm_split(grid.world, grid.pp_rank, grid.tp_rank, &grid.tp);
    MPI_Comm_split(grid.world, grid.tp_rank, grid.pp_rank, &grid.pp);
}

// Runs `checks`; throws on every rank where they fail on any: a rank that threw alone would leave the others waiting.
template <typename Checks>
void check_together(MPI_Comm comm, Checks checks) {
    std::string error;
    try {
        checks();
    } catch (const c10::Error& e) {
        error = e.what_without_backtrace();
    }
    int failed = error.empty() ? 0 : 1, any_failed = 0;
    MPI_Allreduce(&failed, &any_failed, 1, MPI_INT, MPI_MAX, comm);
    TORCH_CHECK(!failed, error);
    TORCH_CHECK(!any_failed, "stand-in: another rank refused its arguments");
}

inline Tensor sum_over(MPI_Comm comm, const Tensor& partial) {
    Tensor total = partial.contiguous();
    MPI_Allreduce(MPI_IN_PLACE, total.data_ptr<float>(), static_cast<int>(total.numel()), MPI_FLOAT, MPI_SUM, comm);
    return total;
}

template <typename T>
void broadcast_from_last_stage(const Grid& grid, std::vector<T>& values) {
    MPI_Bcast(values.data(), static_cast<int>(values.size() * sizeof(T)), MPI_BYTE, grid.pp_size - 1, grid.pp);
}

}  // namespace standin
