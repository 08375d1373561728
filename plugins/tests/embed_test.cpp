// SPDX-License-Identifier: Apache-2.0
#include "harness.h"

namespace test {

void testEmbed(Lib& lib) {
  Rng rng(1);
  for (const int32_t type : {EC_F32, EC_F16}) {
    for (const int32_t d : {1, 17, 72}) {
      const int32_t vocab = 11, tokens = 5;
      const Weight table = makeWeight(lib, rng, type, vocab, d);
      Ints ids(tokens);
      for (int32_t& id : ids) id = rng.below(vocab);
      Floats x(static_cast<size_t>(tokens) * d, NAN), want;
      for (const int32_t id : ids) {
        want.insert(want.end(), table.dense.begin() + id * d, table.dense.begin() + (id + 1) * d);
      }
      Batch batch;
      batch.add(tokens, 0);
      ec_embed args{ids.data(), table.view, x.data()};
      lib.ok(EC_OP_EMBED, batch.step(), &args, "embed");
      lib.check(x == want, "embed %s, d = %d", typeName(type), d);
      ids[3] = vocab;
      lib.refuses(EC_OP_EMBED, batch.step(), &args, "tokens[3] is 11");
      ids[3] = -1;
      lib.refuses(EC_OP_EMBED, batch.step(), &args, "tokens[3] is -1");
    }
  }
}

}  // namespace test
