// Matrix products of a warpgroup (wgmma, sm_90): 64 rows, kColumns columns, 16 deep, sums in float32.
//
// Lane l of warp w holds d[4j], d[4j + 1]: row 16w + l / 4, columns 8j + 2 (l % 4) and the next; d[4j + 2], d[4j + 3]: the
// row 8 below. An operand in registers is packed as that of mma.m16n8k16. Operands in shared memory are given by a
// descriptor, see `swizzled_matrix`.
#pragma once

namespace kvt::ptx {

// wgmma.fence: before the first product after registers were written by other instructions.
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// wgmma.commit_group: the products since the last one are a group.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// wgmma.wait_group: until at most kPending groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads and writes of registers past here: products use them while other code runs.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void pin(unsigned (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// The descriptor of a matrix in shared memory at a multiple of 1024 bytes, rows of 128 bytes, swizzled by 128 bytes.
// Row-major: `group_bytes` from 8 rows to the next 8. Column-major (rows are the deep dimension): `group_bytes` from 8
// rows to the next 8, `chunk_bytes` from 64 columns to the next 64.
__device__ __forceinline__ unsigned long long swizzled_matrix(unsigned address, int group_bytes, int chunk_bytes = 16) {
  return 1ull << 62 | static_cast<unsigned long long>(group_bytes >> 4) << 32 |
         static_cast<unsigned long long>(chunk_bytes >> 4) << 16 | (address & 0x3FFFF) >> 4;
}

// d = a b, or d += a b where `adds`; a and b row-major in shared memory (b as [columns][16]).
// d += a b; a in registers, b in shared memory as [16][columns], column-major.
template <typename Scalar, int kColumns>
struct Product;

// The registers of d as operands, %0 to %31, to %47, and so on.
#define KVT_D_32                                                                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23" \
  ", %24, %25, %26, %27, %28, %29, %30, %31"
#define KVT_OUT_32                                                                                            \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define KVT_D_48 \
  KVT_D_32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define KVT_OUT_48                                                                                                    \
  KVT_OUT_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
      "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define KVT_D_64 \
  KVT_D_48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define KVT_OUT_64                                                                                                    \
  KVT_OUT_48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
      "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define KVT_D_96                                                                                                     \
  KVT_D_64                                                                                                           \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
  "%86, %87"                                                                                                         \
  ", %88, %89, %90, %91, %92, %93, %94, %95"
#define KVT_OUT_96                                                                                                    \
  KVT_OUT_64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
      "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),         \
      "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),         \
      "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define KVT_D_128                                                                                                    \
  KVT_D_96                                                                                                           \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, " \
  "%115, %116, %117, %118, %119"                                                                                     \
  ", %120, %121, %122, %123, %124, %125, %126, %127"
#define KVT_OUT_128                                                                                                   \
  KVT_OUT_96, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]),           \
      "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), \
      "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), \
      "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), \
      "+f"(d[127])

#define KVT_PRODUCT(SCALAR, TYPE, COLUMNS, COUNT, A0, A1, A2, A3, B)                                        \
  template <>                                                                                               \
  struct Product<SCALAR, COLUMNS> {                                                                         \
    __device__ __forceinline__ static void shared(                                                          \
        float (&d)[COUNT], unsigned long long a, unsigned long long b, int adds) {                          \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, " A2 ", 0; wgmma.mma_async.sync.aligned.m64n" #COLUMNS   \
                   "k16.f32." TYPE "." TYPE " {" KVT_D_##COUNT "}, " A0 ", " A1 ", p, 1, 1, 0, 0; }"        \
                   : KVT_OUT_##COUNT                                                                        \
                   : "l"(a), "l"(b), "r"(adds)                                                              \
                   : "memory");                                                                             \
    }                                                                                                       \
    __device__ __forceinline__ static void registers(                                                       \
        float (&d)[COUNT], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned long long b) {      \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE " {" KVT_D_##COUNT \
                   "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", 1, 1, 1, 1;"                                \
                   : KVT_OUT_##COUNT                                                                        \
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b)                                             \
                   : "memory");                                                                             \
    }                                                                                                       \
  };
KVT_PRODUCT(Half, "f16", 64, 32, "%32", "%33", "%34", "%35", "%36")
KVT_PRODUCT(BFloat16, "bf16", 64, 32, "%32", "%33", "%34", "%35", "%36")
KVT_PRODUCT(Half, "f16", 96, 48, "%48", "%49", "%50", "%51", "%52")
KVT_PRODUCT(BFloat16, "bf16", 96, 48, "%48", "%49", "%50", "%51", "%52")
KVT_PRODUCT(Half, "f16", 128, 64, "%64", "%65", "%66", "%67", "%68")
KVT_PRODUCT(BFloat16, "bf16", 128, 64, "%64", "%65", "%66", "%67", "%68")
KVT_PRODUCT(Half, "f16", 192, 96, "%96", "%97", "%98", "%99", "%100")
KVT_PRODUCT(BFloat16, "bf16", 192, 96, "%96", "%97", "%98", "%99", "%100")
KVT_PRODUCT(Half, "f16", 256, 128, "%128", "%129", "%130", "%131", "%132")
KVT_PRODUCT(BFloat16, "bf16", 256, 128, "%128", "%129", "%130", "%131", "%132")
#undef KVT_PRODUCT

}  // namespace kvt::ptx
