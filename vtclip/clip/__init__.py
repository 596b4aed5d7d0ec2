# SPDX-License-Identifier: Apache-2.0
"""Frozen CLIP models: images and class names to image features, spatial features and class texts.

model.py                 Clip: images and class names to features
identity.py              what decides a feature, and where two models differ in it
spatial.py               the kinds of spatial features, and how a vision tower computes them
texts.py                 templates, prompts that are too long, unit rows
loading.py               model names to models
names.py                 what a typed name stands for, and the nearest names
architecture.py          networks from settings, and settings from the shapes of weights
weights.py, archives.py  files of weights; OpenAI's TorchScript archives, without running them
provenance.py            which activation and preprocessing a file of weights needs
transformers_folders.py  folders of transformers' CLIP and SigLIP (with transformers_keys.py and
                         folder_tokenizer.py)
listing.py               what can be named, and which weights are on this machine
convert.py               a file of weights as safetensors that says what it is

This is the only package that imports open_clip, and it does so inside functions, so that importing
vtclip stays cheap. Model names, for load_clip and --model:

    demo                      the small model that ships with the package
    ViT-B-32:openai           ARCHITECTURE:TAG, fetched by the hub client into its own cache
    ViT-B-32:/w.safetensors   ARCHITECTURE:FILE; .safetensors, .pt, .pth, .bin: a state dict, a
                              checkpoint of training, or OpenAI's TorchScript archive (read as data)
    ViT-B-32:openai:/w.pt     ARCHITECTURE:TAG:FILE: weights of FILE, activation and preprocessing
                              of TAG
    /w.safetensors            FILE alone: what `vtclip convert` wrote into it, else what its shapes
                              show
    /folder, local-dir:/folder
                              open_clip_config.json + weights (+ vocab.json, word tokenizer), or
                              transformers' config.json + model.safetensors of CLIP or SigLIP
    hf-hub:owner/name         a hub repository in one of these two layouts
    ViT-B/32                  OpenAI's spelling, of its own weights: ViT-B-32:openai
    openai/clip-vit-base-patch32, google/siglip-..., laion/CLIP-...
                              known repositories: the same weights as ARCHITECTURE:TAG, or the
                              repository itself where it is in the hub client's cache

Case and signs do not matter (vit_b_32:OpenAI); a warning says what such a name is taken as. Weights
do not show the activation they were trained with: where neither the file nor the name tells it and
published weights of the architecture differ, a warning says what is assumed (see provenance.py).
SigLIP's tokenizers need `pip install 'vtclip[siglip]'`.

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
