// Landmark attention: dense problems whose keys carry a group structure (landmark_scores.h).
#include "attn_driver.h"

namespace lctx::cpu {
namespace {

// Group structure of every sequence; one entry shared by the whole batch when landmarks are
// regular.
struct GroupTables {
  std::vector<std::vector<int32_t>> end, of_key;
  std::vector<bool> last_is_complete;
  int64_t max_group = 0;

  Groups of_batch(int64_t b) const {
    const size_t i = end.size() == 1 ? 0 : static_cast<size_t>(b);
    return {end[i].data(), of_key[i].data(), static_cast<int32_t>(end[i].size()),
            last_is_complete[i]};
  }
};

template <class IsLandmark>
void add_sequence(GroupTables& tables, int64_t Tk, const IsLandmark& is_landmark) {
  std::vector<int32_t> end, of_key(static_cast<size_t>(Tk));
  int64_t begin = 0;
  for (int64_t j = 0; j < Tk; ++j) {
    of_key[static_cast<size_t>(j)] = static_cast<int32_t>(end.size());
    if (is_landmark(j) || j + 1 == Tk) {
      end.push_back(static_cast<int32_t>(j + 1));
      tables.max_group = std::max(tables.max_group, j + 1 - begin);
      begin = j + 1;
    }
  }
  tables.end.push_back(std::move(end));
  tables.of_key.push_back(std::move(of_key));
  tables.last_is_complete.push_back(Tk > 0 && is_landmark(Tk - 1));
}

GroupTables make_groups(const LandmarkParams& params) {
  GroupTables tables;
  const int64_t Tk = params.shape.Tk;
  if (params.block_size > 0) {
    add_sequence(tables, Tk, [&](int64_t j) { return (j + 1) % params.block_size == 0; });
    return tables;
  }
  for (int64_t b = 0; b < params.shape.B; ++b) {
    add_sequence(tables, Tk, [&](int64_t j) { return params.is_landmark[b * Tk + j]; });
  }
  return tables;
}

std::vector<Problem> landmark_problems(const LandmarkParams& params, const AttnLaunch& launch,
                                       const GroupTables& tables, const AttnGrads* grads,
                                       const void* delta) {
  const int64_t G = params.shape.Hq / params.shape.Hkv;
  std::vector<Problem> problems;
  for (int64_t b = 0; b < params.shape.B; ++b) {
    for (int64_t h = 0; h < params.shape.Hq; h += G) {
      Problem p = make_problem(params, launch, b, h, G, grads, delta);
      p.groups = tables.of_batch(b);
      problems.push_back(p);
    }
  }
  return problems;
}

AttnLaunch landmark_launch(const LandmarkParams& params, const GroupTables& tables) {
  AttnLaunch launch = make_launch(params);
  launch.causal = true;
  launch.scores = Scores::kLandmark;
  launch.max_group = tables.max_group;
  return launch;
}

}  // namespace

void landmark_fwd(const LandmarkParams& params, const ThreadPool& pool) {
  const GroupTables tables = make_groups(params);
  const AttnLaunch launch = landmark_launch(params, tables);
  run_forward(launch, landmark_problems(params, launch, tables, nullptr, nullptr), pool);
}

void landmark_bwd(const LandmarkParams& params, const AttnGrads& grads, const ThreadPool& pool) {
  const GroupTables tables = make_groups(params);
  const Buffer delta = make_delta(params, grads, pool);
  const AttnLaunch launch = landmark_launch(params, tables);
  run_backward(launch, landmark_problems(params, launch, tables, &grads, delta.get()), pool);
}

}  // namespace lctx::cpu
