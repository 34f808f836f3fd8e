"""Text to token blocks, with a state that restores to the token.

The way of the data: `registry` (what --task-name may say), `documents` (shuffled text of one
source), `packing` (blocks of tokens), `mixture` (one stream of several sources), `loader` (batches
made ahead), `build` (these put together); `evaluation` packs a file in order.
"""
