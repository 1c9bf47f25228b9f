"""The stock recipes of torchtune 0.6.1 and the config keys that each reads.

torchtune ignores a key that its recipe does not read: a misspelt one would train with the
default. tests/test_torchtune.py compares every line here with the pinned source.
"""

EVERY = (
    "batch_size checkpointer compile cudnn_deterministic_mode dataset device dtype "
    "enable_activation_checkpointing gradient_accumulation_steps log_every_n_steps "
    "log_peak_memory_stats loss metric_logger optimizer output_dir resume_from_checkpoint seed "
    "shuffle tokenizer "
)
TUNED = EVERY + "epochs fsdp_cpu_offload fsdp_reshard_after_forward max_steps_per_epoch model "

# Of both variants, …_single_device and …_distributed: one config serves one process and many.
_READ = {
    "full_dpo": TUNED + "clip_grad_norm custom_sharded_layers enable_activation_offloading "
    "lr_scheduler optimizer_in_bwd profiler ref_checkpointer",
    "full_finetune": TUNED + "ac_mode ac_option clip_grad_norm collate_fn custom_sharded_layers "
    "enable_activation_offloading enable_async_checkpointing lr_scheduler optimizer_in_bwd "
    "profiler tensor_parallel_dim tensor_parallel_plan",
    "knowledge_distillation": TUNED + "clip_grad_norm custom_sharded_layers kd_loss kd_ratio "
    "low_cpu_ram lr_scheduler profiler save_adapter_weights_only teacher_checkpointer "
    "teacher_model",
    "lora_dpo": TUNED + "custom_sharded_layers enable_activation_offloading lr_scheduler "
    "save_adapter_weights_only",
    "lora_finetune": TUNED + "clip_grad_norm collate_fn custom_sharded_layers "
    "enable_activation_offloading low_cpu_ram lr_scheduler profiler save_adapter_weights_only",
    "ppo_full_finetune": EVERY + "enable_kv_cache forward_batch_size gamma kl_coeff lmbda "
    "max_generated_tokens min_response_length num_steps optimizer_in_bwd penalise_no_eos "
    "policy_model ppo_batch_size ppo_epochs profiler ref_policy_checkpointer "
    "reward_and_value_model reward_checkpointer reward_penalty stop_token_ids temperature top_k "
    "value_checkpointer whiten_rewards",
    "qat": TUNED + "ac_mode ac_option clip_grad_norm collate_fn custom_sharded_layers "
    "enable_activation_offloading fake_quant_after_n_steps optimizer_in_bwd profiler quantizer",
    "qat_lora_finetune": TUNED + "clip_grad_norm collate_fn enable_activation_offloading "
    "lr_scheduler profiler quantizer save_adapter_weights_only",
}
KEYS = {name: frozenset(keys.split()) for name, keys in _READ.items()}

SINGLE_DEVICE = KEYS.keys() - {"full_dpo", "qat", "qat_lora_finetune"}
DISTRIBUTED = KEYS.keys() - {"ppo_full_finetune"}
STARTS_GROUP = {"full_finetune"}  # in its distributed class; the others leave it to their main()
