"""Arguments of runs on generated point clouds, at toy size."""

TINY_BACKBONE = [
    "--backbone.weights=random", "--backbone.init=torch", "--backbone.dim=24", "--backbone.depth=2",
    "--backbone.num_heads=3", "--backbone.num_group=16", "--backbone.group_size=8",
    "--backbone.pointnet_dims=[8,16,16]",
]  # fmt: skip
TINY_DATA = [
    "--data.shots=4", "--data.val_per_class=2", "--data.test_per_class=2", "--data.num_points=128",
    "--data.pool_points=160", "--data.batch_size=16",
]  # fmt: skip
SHORT = ["--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=1"]
IDPT = ["--config", "pointcloud_idpt.yaml", *TINY_BACKBONE, *TINY_DATA, *SHORT, "--method.k=8"]
PRETRAIN = [
    "--config", "pointcloud_pretrain_nano.yaml", *TINY_BACKBONE, *SHORT, "--data.per_family=2", "--data.num_points=128",
    "--data.pool_points=128", "--data.batch_size=16", "--head.num_heads=3", "--head.group_size=8",
]  # fmt: skip
