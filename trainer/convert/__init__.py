"""Other formats, a package each; no rank imports them.

`huggingface` exports and imports a whole model, `deepspeed` reads checkpoints with optimizer state. To add an export format, write a
package beside them with a function like `huggingface.export.export`, and an option of `manta export` (launch/cli.py).
"""
