// Clusters of blocks; see cuda_runtime.h.

#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
    unsigned block_rank() const { return emulation::block->rank; }
    unsigned num_blocks() const { return emulation::block->cluster.blocks; }

    void sync() const {
        __syncthreads();
        if (threadIdx.x == 0) emulation::block->cluster.arrivals.arrive_and_wait();
        __syncthreads();
    }

    template <typename T>
    T* map_shared_rank(T* own, int rank) const {
        const auto offset = reinterpret_cast<char*>(own) - emulation::minitron_shared_memory;
        return reinterpret_cast<T*>(emulation::block->cluster.shared[rank] + offset);
    }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
