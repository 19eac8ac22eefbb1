"""Small random models of every backbone family: 32 px images, three blocks of width 32."""

import re
import zlib

import open_clip
import timm
import torch
from open_clip.model import CustomTextCLIP
from packaging.version import Version
from timm.layers import HybridEmbed
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from tiny import perturb

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 5,
}
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
TEXT = {"context_length": 40, "width": 16, "heads": 2, "layers": 2}


def timm_model(kind, **options):
    return kind(**SMALL | options)


def hybrid(**options):
    return HybridEmbed(torch.nn.Conv2d(3, 8, 4, 4), **options | {"patch_size": 2})


def swin(kind, window_size, num_classes=5):
    return kind(
        img_size=32,
        patch_size=4,
        embed_dim=16,
        depths=(2, 1),
        num_heads=(2, 4),
        window_size=window_size,
        num_classes=num_classes,
    )


def naflex(**options):
    cfg = NaFlexVitCfg(patch_size=8, embed_dim=32, depth=3, num_heads=2, **options)
    return NaFlexVit(cfg, num_classes=5, img_size=32)


def clip(kind=open_clip.CLIP, vision=(), text=(), embed_dim=16, **options):
    vision, text = VISION | dict(vision), TEXT | dict(text)
    return kind(embed_dim, vision_cfg=vision, text_cfg=text, **options)


def timm_clip(trunk, kind=CustomTextCLIP, **options):
    """A CLIP whose image tower is `trunk`, in open_clip's TimmModel."""
    model = clip(kind, {"timm_model_name": "test_vit", "timm_proj": ""}, **options)
    model.visual.trunk = trunk
    return model


def coca():
    decoder = {"context_length": 40, "width": 16, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
    vision = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = {"embed_cls": True, "output_tokens": True}
    return clip(open_clip.CoCa, vision, text, multimodal_cfg=decoder)


def siglip_tokens(texts, length=40, end=1, pad=1):
    """Ids as SigLIP's tokenizer makes them, of whole words: no begin mark, no punctuation."""
    ids = torch.full((len(texts), length), pad)
    for row, text in zip(ids, texts, strict=True):
        words = re.sub(r"[^\w\s]", "", text.lower()).split()
        words = [2 + zlib.crc32(word.encode()) % 31998 for word in words][: length - 1]
        row[: len(words) + 1] = torch.tensor([*words, end])
    return ids


ROTARY = {"use_rot_pos_emb": True, "attn_type": "rope"}
SIGLIP_TEXT = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "vocab_size": 32000}
FAMILIES = {
    "vit": (VisionTransformer, {}),
    "deit3": (VisionTransformer, {"no_embed_class": True, "init_values": 0.1}),
    "dinov2_reg": (VisionTransformer, {"reg_tokens": 4, "no_embed_class": True}),
    "qk_norm": (VisionTransformer, {"qk_norm": True, "init_values": 0.5, "qkv_bias": False}),
    "mae": (VisionTransformer, {"global_pool": "avg", "fc_norm": True}),
    "without_class_token": (VisionTransformer, {"global_pool": "avg", "class_token": False}),
    "clip_vision": (VisionTransformer, {"pre_norm": True, "final_norm": True}),
    "siglip": (VisionTransformer, {"global_pool": "map", "class_token": False}),
    "scaled_norm": (VisionTransformer, {"scale_attn_norm": True, "drop_path_rate": 0.5}),
    "dynamic": (VisionTransformer, {"dynamic_img_size": True, "num_classes": 0}),
    "hybrid": (VisionTransformer, {"embed_layer": hybrid}),
    "deit_distilled": (VisionTransformerDistilled, {}),
    "beit": (Beit, {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1}),
    "beit_shared": (Beit, {"use_shared_rel_pos_bias": True, "global_pool": "token"}),
    "beit_both": (Beit, {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True}),
    "relpos": (VisionTransformerRelPos, {"init_values": 0.1}),
    "relpos_token": (
        VisionTransformerRelPos,
        {"rel_pos_type": "bias", "class_token": True, "global_pool": "token", "qk_norm": True},
    ),
    "relpos_shared": (VisionTransformerRelPos, {"shared_rel_pos": True, "fc_norm": True}),
    "eva": (Eva, {"init_values": 0.1}),
    "eva02": (
        Eva,
        {"use_rot_pos_emb": True, "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True}
        | {"scale_attn_inner": True, "ref_feat_shape": (7, 7)},
    ),
    "dinov3": (
        Eva,
        ROTARY
        | {"rope_type": "dinov3", "rope_rotate_half": True, "num_reg_tokens": 4, "qkv_bias": False}
        | {"use_abs_pos_emb": False, "dynamic_img_size": True, "init_values": 0.1}
        | {"global_pool": "token"},
    ),
    "pe": (
        Eva,
        ROTARY
        | {"global_pool": "map", "use_pre_transformer_norm": True, "attn_pool_num_heads": 2}
        | {"rope_grid_indexing": "xy", "rope_grid_offset": 1.0},
    ),
    "rope_mixed": (Eva, ROTARY | {"rope_type": "mixed", "class_token": False}),
    "rope_qk_norm": (Eva, ROTARY | {"qk_norm": True}),
    "eva_grouped_heads": (Eva, ROTARY | {"num_kv_heads": 1, "qkv_fused": False}),
    "eva_post_norm": (Eva, {"use_post_norm": True, "use_rot_pos_emb": True}),
}
MODELS = {
    **{
        name: (lambda kind=kind, options=options: timm_model(kind, **options))
        for name, (kind, options) in FAMILIES.items()
    },
    "naflex": naflex,
    "naflex_map": lambda: naflex(global_pool="map", class_token=False, reg_tokens=1),
    "swin": lambda: swin(SwinTransformer, 4),
    "swin_padded": lambda: swin(SwinTransformer, 3),
    "swinv2": lambda: swin(SwinTransformerV2, 4),
    "swinv2_padded": lambda: swin(SwinTransformerV2, 3),
    "clip_tower": lambda: clip().visual,
    "clip": clip,
    "clip_qk_norm": lambda: clip(vision={"qk_norm": True}),
    "clip_average": lambda: clip(vision={"pool_type": "avg", "final_ln_after_pool": True}),
    "coca": coca,
    "clip_custom_text": lambda: clip(CustomTextCLIP),
    "siglip_clip": lambda: timm_clip(
        timm_model(VisionTransformer, num_classes=0, global_pool="map", class_token=False),
        text=SIGLIP_TEXT,
        embed_dim=32,
        init_logit_bias=-1.0,
    ),
    "eva02_clip": lambda: timm_clip(
        timm_model(Eva, num_classes=16, use_rot_pos_emb=True, global_pool="token")
    ),
    "swin_clip": lambda: timm_clip(swin(SwinTransformer, 4, num_classes=16), open_clip.CLIP),
}
if Version(timm.__version__) < Version("1.0.30"):  # cannot build these, or not run in float64
    for name in ("eva_grouped_heads", "rope_mixed", "rope_qk_norm", "swinv2_padded"):
        del MODELS[name]


def build(name, seed=0):
    """The model called `name`, in eval mode; no parameter stays at its initial value."""
    torch.manual_seed(seed)
    return perturb(MODELS[name]())


def is_clip(model):
    return isinstance(model, open_clip.CLIP | CustomTextCLIP | open_clip.CoCa)


def bare_features(model, images):
    """The model's own features of images, before any classifier."""
    if is_clip(model):
        return model.encode_image(images, normalize=False)
    if isinstance(model, open_clip.transformer.VisionTransformer):
        return model(images)
    return model.forward_head(model.forward_features(images), pre_logits=True)
