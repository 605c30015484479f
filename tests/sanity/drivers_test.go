package sanity

import "testing"

// A driver is what differs between the values of BERTH_DRIVER.
type driver struct {
	// setup makes the storage beneath the instance's directory and returns its lines of the configuration.
	// instance.removeAll takes away every mount, FUSE process and loop device beneath that directory; anything else
	// that setup makes, it has to give to t.Cleanup itself.
	setup func(t *testing.T, i *instance) string
	// leftovers lists what should be gone when no volume and no snapshot exists.
	leftovers func(t *testing.T, i *instance) []string
	// capabilities is exactly what the driver has to advertise, in the words of advertised.
	capabilities []string
	// access lists the types of volume that the driver has, in csi-sanity's words.
	access []string
	// secrets says that setup has written secretsFile, which calls are then made with.
	secrets bool
	// parameters are those of the class.
	parameters map[string]string
	// mutableParameters are given to volumes that are made with, or modified to, a VolumeAttributesClass.
	mutableParameters map[string]string
	// without has patterns of the specs that the class has no use for, though the driver has the capability.
	without []string
}

// In the instance's directory; its form is that of csi-sanity.
const secretsFile = "secrets.yaml"

var drivers = map[string]driver{
	"nvme": nvmeDriver(),
	"s3": {
		setup:             describeService,
		leftovers:         serviceLeftovers,
		access:            []string{"mount"},
		secrets:           true,
		parameters:        s3Parameters(),
		mutableParameters: map[string]string{"limit": "none", "maxAge": "2s"},
		capabilities: []string{
			"controller CREATE_DELETE_VOLUME",
			"controller LIST_VOLUMES",
			"controller GET_VOLUME",
			"controller EXPAND_VOLUME",
			"controller MODIFY_VOLUME",
			"controller SINGLE_NODE_MULTI_WRITER",
			"controller GET_VOLUME_HEALTH",
			"controller LIST_VOLUME_HEALTH",
			"node STAGE_UNSTAGE_VOLUME",
			"node GET_VOLUME_STATS",
			"node SINGLE_NODE_MULTI_WRITER",
			"node VOLUME_MOUNT_GROUP",
			"node GET_VOLUME_HEALTH",
			"node GET_STORAGE_HEALTH",
			"plugin CONTROLLER_SERVICE",
			"plugin expansion ONLINE",
		},
	},
	"cephfs": {
		setup:             describeCluster,
		leftovers:         clusterLeftovers,
		access:            []string{"mount"},
		secrets:           true,
		mutableParameters: map[string]string{"pin": "distributed=1"},
		capabilities: []string{
			"controller CREATE_DELETE_VOLUME",
			"controller LIST_VOLUMES",
			"controller CREATE_DELETE_SNAPSHOT",
			"controller LIST_SNAPSHOTS",
			"controller CLONE_VOLUME",
			"controller GET_VOLUME",
			"controller GET_SNAPSHOT",
			"controller EXPAND_VOLUME",
			"controller MODIFY_VOLUME",
			"controller SINGLE_NODE_MULTI_WRITER",
			"controller GET_VOLUME_HEALTH",
			"controller LIST_VOLUME_HEALTH",
			"node STAGE_UNSTAGE_VOLUME",
			"node GET_VOLUME_STATS",
			"node SINGLE_NODE_MULTI_WRITER",
			"node GET_VOLUME_HEALTH",
			"node GET_STORAGE_HEALTH",
			"plugin CONTROLLER_SERVICE",
			"plugin expansion ONLINE",
		},
	},
}
