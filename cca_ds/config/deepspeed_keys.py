"""The keys of DeepSpeed 0.19's file, by section.

DeepSpeed ignores unknown keys beside the sections, so that a misspelt `zero_optimization` trains at stage 0.
"""

_TOP = """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer
    managed_gradient_accumulation scheduler fp16 bf16 bfloat16 amp torch_autocast data_types zero_optimization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown dump_state
    memory_breakdown prescale_gradients gradient_predivide_factor gradient_allreduce_op sparse_gradients
    communication_data_type seq_parallel_communication_data_type disable_allgather activation_checkpointing
    flops_profiler tensorboard wandb csv_monitor comet monitor_config comms_logger timers log_level aio checkpoint
    nebula datastates_ckpt hybrid_engine compile pipeline elasticity autotuning data_efficiency curriculum_learning
    compression_training quantize_training progressive_layer_drop eigenvalue sparse_attention dataloader_drop_last
    use_data_before_expert_parallelism expert_parallel use_node_local_storage graph_harvesting zenflow
    tensor_parallel sequence_parallel_size weight_quantization vocabulary_size disable_python_gc legacy_fusion
"""
_ZERO = """
    allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients cpu_offload cpu_offload_param
    cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks ignore_unused_parameters leaf_module
    legacy_stage1 load_from_fp32_weights log_trace_cache_warnings memory_efficient_linear offload_optimizer
    offload_param overlap_comm override_module_apply parameter_alignment pipeline_loading_checkpoint
    reduce_bucket_size reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory stage
    stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
    stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
    stage3_module_granularity_threshold stage3_param_persistence_threshold stage3_prefetch_bucket_size
    stage3_use_all_reduce_for_fetch_params sub_group_size use_multi_rank_bucket_allreduce zenflow
    zero_hpz_partition_size zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
    max_live_parameters max_reuse_distance prefetch_bucket_size param_persistence_threshold
    model_persistence_threshold gather_16bit_weights_on_model_save
"""
_FP16 = """
    enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
    min_loss_scale fp16_master_weights_and_grads
"""
_BF16 = """
    enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states
"""
_OPTIMIZER = """
    type params legacy_fusion
"""
KNOWN = {
    section: frozenset(keys.split())
    for section, keys in {
        "": _TOP, "zero_optimization": _ZERO, "fp16": _FP16, "bf16": _BF16, "optimizer": _OPTIMIZER
    }.items()
}  # fmt: skip
