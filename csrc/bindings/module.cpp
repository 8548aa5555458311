// minitron._C: importing it registers the kernels; what is bound here is no tensor op.

#include <pybind11/pybind11.h>

#include <array>
#include <string>

#include "check.h"
#include "kl_merge.h"

namespace {

using Floats = std::array<float, minitron::kNumStatistics>;

minitron::KLStatistics statistics_of(const pybind11::sequence& values) {
    Floats v;
    if (values.size() != v.size()) throw pybind11::value_error("8 statistics are expected");
    for (size_t i = 0; i < v.size(); ++i) v[i] = values[i].cast<float>();
    return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]};
}

pybind11::tuple merge(const pybind11::sequence& u, const pybind11::sequence& v, float temperature) {
    const auto r = minitron::kl_merge(statistics_of(u), statistics_of(v), temperature);
    return pybind11::make_tuple(r.m, r.n, r.a, r.b, r.c, r.d, r.e, r.l);
}

pybind11::dict build_information() {
    pybind11::dict d;
    d["compiler"] = __VERSION__;
    d["cpu_capability"] = std::string(minitron::cpu_capability());
#if defined(MINITRON_CUDA)
    d["devices"] = pybind11::make_tuple("cpu", "cuda");
#else
    d["devices"] = pybind11::make_tuple("cpu");
#endif
    return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.def("kl_merge", &merge, "Merge two tuples of 8 statistics; see csrc/include/kl_merge.h.");
    m.def("build_information", &build_information, "How this extension was built.");
}
