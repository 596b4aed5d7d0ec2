# SPDX-License-Identifier: Apache-2.0
"""Frozen CLIP models: images and class names to image features, spatial features and class texts.

model.py      Clip: images and class names to features
spatial.py    the kinds of spatial features, and how a vision tower computes them
identity.py   what decides a feature, and where two models differ in it
texts.py      templates, prompts that are too long, unit rows
loading.py    model names to models

This is the only package that imports open_clip, and it does so inside functions, so that importing
vtclip stays cheap. Model names:

    demo                              the small model that ships with the package
    ViT-B-32:openai                   architecture:tag, fetched by the hub client into its own cache
    ViT-B-32-quickgelu:/w.safetensors architecture:file
    local-dir:/folder  or  /folder    open_clip_config.json + weights (+ vocab.json, word tokenizer)
    hf-hub:owner/name                 a hub repository in open_clip's layout

Spatial options, [B, L, Cs]:

    ResNet   raw        C4 map before the attention pool, row-major
             pooled     every map position as a query of the whole attention pool (default)
             value      c_proj(v_proj(x)) of each position alone, without positional embedding
    ViT      raw        patch tokens after ln_post, before the projection
             projected  ln_post, then the projection into the joint space (default)
    timm     raw        the trunk's last intermediate, where the trunk offers one
"""

from vtclip.clip.architecture import build_clip
from vtclip.clip.convert import convert_file
from vtclip.clip.hub import ClipNotFound
from vtclip.clip.identity import differences, identity_of
from vtclip.clip.loading import load_clip
from vtclip.clip.model import Clip
from vtclip.clip.texts import DEFAULT_TEMPLATE, mean_text, resolve_templates

__all__ = [
    "DEFAULT_TEMPLATE",
    "Clip",
    "ClipNotFound",
    "build_clip",
    "convert_file",
    "differences",
    "identity_of",
    "load_clip",
    "mean_text",
    "resolve_templates",
]
