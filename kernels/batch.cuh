// Which sequence of a batch a query token belongs to.
//
// what      a search in the running counts of query tokens
// mapping   one call per thread; threads of one row ask alike
// bytes     4 per step of the search
// host twin np.searchsorted

#pragma once

#include "device.cuh"

// The sequence that owns a token: the last whose first token is not beyond it.
DEVICE int sequence_of(const int* starts, int batch, int token) {
    int low = 0, high = batch - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (starts[middle] <= token) low = middle;
        else high = middle - 1;
    }
    return low;
}
