//! Buckets as a whole: made, looked for, deleted; tried again for a while. For the CSI back end; a mount has no use for it.

use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::types::{BucketLocationConstraint, CreateBucketConfiguration};

use super::failure::failed;
use super::patient::until;
use super::sdk::S3;
use super::{StoreErrorKind, StoreResult};

impl S3 {
    /// Makes the bucket. Being ours already is success.
    ///
    /// # Errors
    /// `Conflict`: it is somebody else's. `Invalid`: the service won't have the name.
    pub async fn ensure_bucket(&self) -> StoreResult<()> {
        until(self.patience, || self.ensured()).await
    }

    async fn ensured(&self) -> StoreResult<()> {
        // AWS wants to hear the region, but not its oldest; others have names of their own for places, and know what is
        // meant by none.
        let named = self.aws && self.region != "us-east-1";
        match self.create(named).await {
            Err((_, Some(code))) if code == "BucketAlreadyOwnedByYou" => Ok(()),
            Err((_, Some(code))) if !named && code.ends_with("LocationConstraintException") => {
                self.create(true).await.map_err(|(error, _)| error)
            }
            result => result.map_err(|(error, _)| error),
        }
    }

    async fn create(&self, named: bool) -> Result<(), (super::StoreError, Option<String>)> {
        let place = BucketLocationConstraint::from(self.region.as_str());
        let place = named.then(|| CreateBucketConfiguration::builder().location_constraint(place).build());
        let call = self.client.create_bucket().bucket(&self.bucket).set_create_bucket_configuration(place);
        match call.send().await {
            Ok(_) => Ok(()),
            Err(error) => {
                let code = error.code().map(str::to_owned);
                Err((failed("make the bucket", &self.bucket, &error), code))
            }
        }
    }

    /// Is there such a bucket that we may look at?
    ///
    /// # Errors
    /// `Denied`: there is one, which is not for us.
    pub async fn bucket_exists(&self) -> StoreResult<bool> {
        let looked = until(self.patience, || async {
            let call = self.client.head_bucket().bucket(&self.bucket);
            call.send().await.map_err(|error| failed("look at the bucket", &self.bucket, &error))
        });
        match looked.await {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.kind, StoreErrorKind::NotFound | StoreErrorKind::NoBucket) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Deletes the bucket, which must be empty. Not being there is success.
    ///
    /// # Errors
    /// `Conflict`: there is something in it.
    pub async fn delete_bucket(&self) -> StoreResult<()> {
        let deleted = until(self.patience, || async {
            let call = self.client.delete_bucket().bucket(&self.bucket);
            call.send().await.map_err(|error| failed("delete the bucket", &self.bucket, &error))
        });
        match deleted.await {
            Err(error) if matches!(error.kind, StoreErrorKind::NotFound | StoreErrorKind::NoBucket) => Ok(()),
            result => result.map(|_| ()),
        }
    }
}
