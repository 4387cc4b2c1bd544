"""Aesthetic heads: what they are, how they load, how a checkpoint becomes one."""

from aesthetic_filter.heads.convert import convert as convert
from aesthetic_filter.heads.head import Head as Head
from aesthetic_filter.heads.head import save_head as save_head
from aesthetic_filter.heads.load import bundled_heads as bundled_heads
from aesthetic_filter.heads.load import load_head as load_head
