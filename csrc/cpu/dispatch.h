// Chooses among the builds of a kernel at run time.
//
// A kernel `f` is declared by MINITRON_CPU_KERNEL(f, signature) and defined in a file that setup.py
// compiles once per instruction set, inside `namespace minitron { namespace CPU_CAPABILITY`.
// `f_on_this_cpu()` is the best one that torch allows here (ATEN_CPU_CAPABILITY lowers it).

#pragma once

#include <string_view>

#if defined(MINITRON_X86)
#define MINITRON_CPU_KERNEL(name, ...)                            \
    namespace DEFAULT {                                           \
    __VA_ARGS__;                                                  \
    }                                                             \
    namespace AVX2 {                                              \
    __VA_ARGS__;                                                  \
    }                                                             \
    namespace AVX512 {                                            \
    __VA_ARGS__;                                                  \
    }                                                             \
    inline auto name##_on_this_cpu(std::string_view capability) { \
        return capability == "AVX512" ? AVX512::name              \
               : capability == "AVX2" ? AVX2::name                \
                                      : DEFAULT::name;            \
    }
#else
#define MINITRON_CPU_KERNEL(name, ...) \
    namespace DEFAULT {                \
    __VA_ARGS__;                       \
    }                                  \
    inline auto name##_on_this_cpu(std::string_view) { return DEFAULT::name; }
#endif
