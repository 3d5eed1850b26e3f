// Loads and transposes of 8x8 matrices of 16-bit elements, one instruction per function.
//
// In the fragment of a matrix, lane l holds columns 2 * (l % 4) and 2 * (l % 4) + 1 of row l / 4, packed in 32 bits.
#pragma once

namespace kvt::ptx {

// ldmatrix.x4: four matrices; lane l gives the address of row l % 8 of matrix l / 8, a multiple of 16 bytes.
__device__ __forceinline__ void load_matrices(unsigned (&fragment)[4], unsigned shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_row)
               : "memory");
}

// ldmatrix.x4.trans: the same, with each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&fragment)[4], unsigned shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_row)
               : "memory");
}

// stmatrix.x4.trans (sm_90): stores the transposes of four matrices; lane l gives the address of row l % 8 of what
// becomes of matrix l / 8.
__device__ __forceinline__ void store_matrices_transposed(unsigned shared_row, uint4 fragment) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_row),
               "r"(fragment.x), "r"(fragment.y), "r"(fragment.z), "r"(fragment.w)
               : "memory");
}

// movmatrix.trans: the fragment of the transposed matrix.
__device__ __forceinline__ unsigned transpose_matrix(unsigned fragment) {
  unsigned transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(fragment));
  return transposed;
}

// ld.shared.v4.u32: 16 bytes.
__device__ __forceinline__ uint4 load_shared_16(unsigned shared) {
  uint4 words;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(shared)
               : "memory");
  return words;
}

// ld.shared.u32: 4 bytes.
__device__ __forceinline__ unsigned load_shared_4(unsigned shared) {
  unsigned word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(shared) : "memory");
  return word;
}

// st.shared.u32: 4 bytes.
__device__ __forceinline__ void store_shared_4(unsigned shared, unsigned word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared), "r"(word) : "memory");
}

// st.shared.v4.u32: 16 bytes.
__device__ __forceinline__ void store_shared_16(unsigned shared, uint4 words) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}

}  // namespace kvt::ptx
