"""The compiled engine: plain functions of a machine record `m`, the arena `a` and the tags `t`."""
