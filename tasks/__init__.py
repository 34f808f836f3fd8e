"""Text to token blocks, with a state that restores to the token.

The way of the data: `registry` (what --task-name may say), `opening` (its files: `jsonl`,
`parquet`, `saved`, `hub`; of registered tasks `cot`, `natural_instructions`, `p3`, `pile`), `lines`
(what a line says), `indexed_documents` and `documents` (a source shuffled truly, through
`jsonl_items`, `saved_items` or `instruction_items`, or buffered), `chat` (conversations as text,
and what answers in them), `packing` (blocks of tokens), `mixture` (one stream of several sources),
`loader` (batches made ahead), `build` (these put together); `evaluation` packs a file in order,
`preview` shows what training would see.
"""
