// The layout of matrix tiles in shared memory, for host and device.
//
// A tile is stored as TMA writes it: chunks of 64 columns (128 bytes), each chunk all rows at a
// pitch of 128 bytes, 16-byte units XORed with the row modulo 8. Tiles start at multiples of 1024
// bytes.
#pragma once

#if defined(__CUDACC__)
#define LCTX_HOST_DEVICE __host__ __device__
#else
#define LCTX_HOST_DEVICE
#endif

namespace lctx {

constexpr int kChunkColumns = 64;  // 16-bit elements of one swizzled row
constexpr int kChunkRowBytes = 128;

LCTX_HOST_DEVICE constexpr int chunk_bytes(int rows) { return rows * kChunkRowBytes; }
// All chunks of a tile of `columns` columns (a multiple of 64).
LCTX_HOST_DEVICE constexpr int tile_bytes(int rows, int columns) { return rows * columns * 2; }

// Byte offset of 16-byte unit `unit` (8 elements) of row `row` in a tile of `rows` rows.
LCTX_HOST_DEVICE constexpr int swizzled_unit(int rows, int row, int unit) {
  return unit / 8 * chunk_bytes(rows) + row * kChunkRowBytes + ((unit % 8 ^ row % 8) << 4);
}

}  // namespace lctx
