#!/usr/bin/env bash
# What `make demo` runs: the main job on a small synthetic sample, each command shown first.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf demo

show() {
  local shown='' word
  for word in "$@"; do
    [[ $word == *' '* ]] && word="\"$word\""
    shown+=" $word"
  done
  printf '\n$%s\n' "$shown"
  "$@"
}

show python scripts/make_sample.py demo/embeddings
show aesthetic-filter score demo/embeddings --out demo/scores
show aesthetic-filter summary demo/scores
show aesthetic-filter filter demo/scores --out demo/kept --top 10% --per source \
  --where "width >= 512" --with-dropped
show aesthetic-filter rank demo/scores -n 5

cat <<'END'

The sample is synthetic: its scores say nothing about any picture. Now on your own embeddings
(CLIP ViT-L/14, .npy or Parquet, a folder, file, glob or URI):

  source .venv/bin/activate
  aesthetic-filter score YOUR_EMBEDDINGS --out scores/
  aesthetic-filter summary scores/
  aesthetic-filter filter scores/ --out kept/ --min-score 5.5
END
