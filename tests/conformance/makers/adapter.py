"""Makes a LoRA adapter with random weights for the language model `org/text`, with peft."""

import sys

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=128,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=8, init_lora_weights=False)
adapted = get_peft_model(LlamaForCausalLM(config), lora)
adapted.peft_config["default"].base_model_name_or_path = "org/text"
adapted.save_pretrained(sys.argv[1])
