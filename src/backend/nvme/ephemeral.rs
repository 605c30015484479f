//! Inline volumes: made with a pod, gone with it.
//!
//! Kubelet names such a volume itself, so its name is hashed like any other; the prefix tells them from volumes that
//! CreateVolume made, which are never deleted here.

use super::parameters::InlineAttributes;
use super::{Nvme, Sort};
use crate::backend::{Ephemeral, Stage};
use crate::error::{ErrorKind, Result};
use crate::secrets::Secrets;
use crate::volume::{Access, AccessMode, Capability, MountPath, Name, Owner, Parameters, Spec, VolumeId};

impl Ephemeral for Nvme {
    fn ensure_present(&self, id: &VolumeId, path: &MountPath, access: &Access, context: &Parameters) -> Result<()> {
        let attributes = InlineAttributes::parse(context)?;
        let capability = Capability { access: access.clone(), mode: AccessMode::SingleNodeWriter };
        let spec = Spec {
            name: Name::new(id.as_str())?,
            capacity: Some(attributes.size),
            capabilities: vec![capability.clone()],
            parameters: attributes.class,
            mutable: Parameters::new(),
            owner: Owner::default(),
            places: Vec::new(),
        };
        let own = self.ephemeral_id(id)?;
        let made = match self.find_volume(own.as_str()) {
            Err(error) if error.kind() == ErrorKind::Unreachable => true,
            found => found?.is_none(),
        };
        self.ensure_made(Sort::Ephemeral, &own, &spec, None)?;
        let stage = Stage { id: own.clone(), path: path.clone(), capability, context: Parameters::new() };
        let staged = match self.find_volume(own.as_str())? {
            Some(found) => self.stage(found, &stage, &Secrets::default()),
            None => fail!(Internal, "the volume {own} vanished while it was mounted"),
        };
        if let Err(error) = &staged
            && made
        {
            // Kubelet takes a failure to mean that nothing is left.
            if let Err(undo) = self.ensure_deleted(Sort::Ephemeral, own.as_str()) {
                tracing::error!(volume.id = %own, %error, %undo, "cannot take back a half-made inline volume");
            }
        }
        staged
    }

    fn ensure_gone(&self, id: &VolumeId) -> Result<()> {
        // A volume that CreateVolume made has no inline one beside it: nothing has to be looked for.
        if self.is_ours(Sort::Volume, id.as_str()).is_some() {
            return Ok(());
        }
        match self.ensure_deleted(Sort::Ephemeral, self.ephemeral_id(id)?.as_str()) {
            Err(error) if error.kind() == ErrorKind::Unreachable => {
                // Its pod may end all the same: the volume is no more at its path.
                tracing::error!(volume.id = %id, %error, "an inline volume may be left in a pool that is missing");
                Ok(())
            }
            done => done,
        }
    }
}

impl Nvme {
    fn ephemeral_id(&self, id: &VolumeId) -> Result<VolumeId> {
        VolumeId::new(self.id(Sort::Ephemeral, id.as_str()))
    }

    /// The id in the pool that kubelet's id stands for: itself, or an inline volume's.
    pub(super) fn own_id(&self, id: &VolumeId) -> Result<VolumeId> {
        if self.is_ours(Sort::Volume, id.as_str()).is_some() { Ok(id.clone()) } else { self.ephemeral_id(id) }
    }

    /// Is `own` the volume that kubelet calls `id`?
    pub(super) fn answers_to(&self, own: &VolumeId, id: &VolumeId) -> bool {
        self.own_id(id).is_ok_and(|id| id == *own)
    }
}
