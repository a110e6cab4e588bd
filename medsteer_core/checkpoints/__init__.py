"""PixArt's weights and PEFT's LoRAs, as their files hold them."""
