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
show aesthetic-filter report demo/scores --out demo/report.html

if python -c 'import torch, PIL' 2>/dev/null && aesthetic-filter models verify >/dev/null 2>&1; then
  show python scripts/make_pictures.py demo/pictures
  show aesthetic-filter score demo/pictures --out demo/picture-scores
  show aesthetic-filter filter demo/picture-scores --out demo/best --top 3 --as folder
  show aesthetic-filter rank demo/picture-scores
else
  printf '\nImages too: that needs torch and Pillow (pip install ".[clip]") and the encoder'
  printf ' (aesthetic-filter models pull, 1.7 GB).\n'
fi

cat <<'END'

The sample is synthetic: its scores say nothing about any picture. Now on your own embeddings
(CLIP ViT-L/14, .npy or Parquet, a folder, file, glob or URI):

  source .venv/bin/activate
  aesthetic-filter score YOUR_EMBEDDINGS --out scores/
  aesthetic-filter report scores/ --out report.html
  aesthetic-filter filter scores/ --out kept/ --min-score 5.5

or on photographs (pip install ".[clip]"; fetches CLIP ViT-L/14, 1.7 GB, on first use):

  aesthetic-filter filter PHOTOS/ --out best/ --top 100 --as folder
END
