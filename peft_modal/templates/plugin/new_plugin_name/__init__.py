"""NewPluginName for peft_modal."""
