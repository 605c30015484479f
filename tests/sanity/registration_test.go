package sanity

import (
	"context"
	"net"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// Kubelet dials a registration socket by its bare path and leaves :authority to grpc-go, which makes it of that path
// (pkg/kubelet/pluginmanager/operationexecutor, dial). csi-sanity does not, so only this shows what kubelet meets.
func TestKubeletCanRegisterTheDriver(t *testing.T) {
	i := start(t)
	ctx, cancel := context.WithTimeout(interrupted, 10*time.Second)
	defer cancel()
	//nolint:staticcheck // DialContext with a bare path is the point: NewClient names the server differently.
	conn, err := grpc.DialContext(ctx, i.path("registry/"+i.name+".csi.berth.dev-reg.sock"),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithBlock(),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := registration.NewRegistrationClient(conn)
	// More than once: from the second call on, the headers come from the connection's table.
	for range 3 {
		info, err := client.GetInfo(ctx, &registration.InfoRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if info.Type != "CSIPlugin" || info.Name != i.name+".csi.berth.dev" || info.Endpoint != i.nodeSocket() ||
			!slices.Equal(info.SupportedVersions, []string{"1.0.0"}) {
			t.Errorf("kubelet was told %v", info)
		}
	}
	if _, err := client.NotifyRegistrationStatus(ctx, &registration.RegistrationStatus{PluginRegistered: true}); err != nil {
		t.Error(err)
	}
}
