"""The LightningModule, the Trainer, and every private part of Lightning that we touch."""
