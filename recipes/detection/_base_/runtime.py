# What every detection recipe shares beside model, data and schedule.
default_scope = "mmdet"
custom_imports = dict(imports=["replknet.tasks.detection"], allow_failed_imports=False)
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2, save_best="coco/bbox_AP", rule="greater"),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
# Box coordinates stay in float32 where the network runs in 16 bits; an epoch draws the same numbers after a resume.
custom_hooks = [dict(type="Float32Boxes"), dict(type="EpochSeeds")]
env_cfg = dict(
    cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0), dist_cfg=dict(backend="nccl")
)
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=True)
log_level = "INFO"
load_from = None
resume = False
